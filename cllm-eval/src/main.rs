//! Command line of `cllm-eval`.

use std::process::ExitCode;

use cllm_eval::cli::Cli;

fn main() -> ExitCode {
    let cli: Cli = cllm_core::program::parse();
    cllm_core::program::main(|| cli.execute())
}
