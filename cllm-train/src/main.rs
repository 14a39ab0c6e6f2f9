//! The program `cllm-train`.

use std::process::ExitCode;

use clap::Parser;
use cllm_train::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    cllm_core::program::main(|| cli.execute())
}
