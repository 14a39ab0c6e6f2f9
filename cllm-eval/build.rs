//! Links libtorch, and says from which commit a release is built.

use std::path::Path;
use std::process::Command;

#[path = "../cllm-core/link/libtorch.rs"]
mod libtorch;

fn main() {
    libtorch::link();
    // Other builds would be repeated after every commit.
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        name_commit();
    }
}

fn name_commit() {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else { return };
    println!("cargo:rustc-env=CLLM_COMMIT={commit}");
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"]);
    if let Some(log) = log.filter(|log| Path::new(log).exists()) {
        println!("cargo:rerun-if-changed={log}");
    }
}
