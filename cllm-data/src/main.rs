//! The program `cllm-data`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = cllm_core::program::parse();
    cllm_core::program::main(|| cllm_data::cli::run(arguments))
}
