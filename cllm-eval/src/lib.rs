//! Measures what a checkpoint gained and lost: accuracy, forwards, speed; draws reports from what was measured.

pub mod acceptance;
pub mod bench;
pub mod charts;
pub mod cli;
pub mod compare;
pub mod config;
pub mod doctor;
pub mod fastchat;
pub mod generate;
pub mod margins;
pub mod measure;
pub mod perplexity;
pub mod pieces;
pub mod profile;
pub mod records;
pub mod report;
pub mod results;
pub mod run;
pub mod score;
pub mod similarity;
pub mod statistics;
pub mod suite;
pub mod table;
pub mod tradeoff;
