//! The program `cllm-train`.

use std::process::ExitCode;

use cllm_train::cli::Cli;

fn main() -> ExitCode {
    let cli: Cli = cllm_core::program::parse();
    cllm_core::program::main(|| cli.execute())
}
