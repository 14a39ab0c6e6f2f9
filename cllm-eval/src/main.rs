//! Command line of `cllm-eval`.

use std::process::ExitCode;

use clap::Parser;
use cllm_eval::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    cllm_core::program::main(|| cli.execute())
}
