//! Command line of `cllm-eval`.

use std::process::ExitCode;

use clap::Parser;
use cllm_eval::cli::Cli;

fn main() -> ExitCode {
    if let Some(code) = cllm_core::sandbox::launch_if_requested() {
        return code;
    }
    let cli = Cli::parse();
    cllm_core::program::main(|| cli.execute())
}
