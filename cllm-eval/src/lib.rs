//! Measures what a checkpoint gained and lost in accuracy, forwards and speed, and draws reports of
//! the measurements.

pub mod acceptance;
pub mod bench;
pub mod cli;
pub mod compare;
pub mod config;
pub mod detokenize;
pub mod doctor;
mod draft_adapters;
pub mod fastchat;
pub mod generate;
pub mod journal;
pub mod mt_bench_turns;
pub mod perplexity;
pub mod profile;
pub mod records;
pub mod report;
pub mod results;
pub mod role;
pub mod run;
pub mod score;
pub mod serve;
pub mod similarity;
mod speedup;
pub mod spider_difficulty;
pub mod statistics;
pub mod suite;
pub mod svg;
pub mod table;
pub mod terminal;
pub mod tradeoff;
mod words;
