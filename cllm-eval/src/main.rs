//! Command line of `cllm-eval`.

use std::process::ExitCode;

use clap::Parser;
use cllm_core::interrupt;
use cllm_eval::cli::Cli;

fn main() -> ExitCode {
    match interrupt::install().and_then(|()| Cli::parse().execute()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
