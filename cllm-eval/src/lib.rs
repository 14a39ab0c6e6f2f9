//! Measures what a checkpoint gained and lost: accuracy, forwards, speed; draws reports from what was measured.

pub mod acceptance;
pub mod bench;
pub mod cli;
pub mod compare;
pub mod config;
pub mod detokenize;
pub mod doctor;
pub mod fastchat;
pub mod generate;
pub mod mt_bench_turns;
pub mod profile;
pub mod records;
pub mod report;
pub mod results;
pub mod role;
pub mod run;
pub mod score;
pub mod similarity;
pub mod spider_difficulty;
pub mod statistics;
pub mod suite;
pub mod svg;
pub mod table;
pub mod tradeoff;
