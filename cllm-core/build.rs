//! Compiles the C++ functions that tch lacks and links libtorch.
//!
//! It is also the launcher of the sandbox: what a build script depends on is compiled apart from the
//! library, without libtorch. It copies its own executable to where the library embeds it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[path = "link/libtorch.rs"]
mod libtorch;

const SOURCES: [&str; 4] = ["csrc/libtorch.cpp", "csrc/graphs.cpp", "csrc/nvrtc.cpp", "csrc/distributed.cpp"];

fn main() -> ExitCode {
    // Cargo starts it without an argument, the sandbox with one.
    if let Some(code) = cllm_launcher::launch_if_requested() {
        return code;
    }
    embed_launcher();
    libtorch::link();
    let torch = std::fs::canonicalize(libtorch::folder()).expect("LIBTORCH is a folder");
    let site_packages = torch.parent().expect("the torch folder is in site-packages");
    // NVRTC compiles the .cu files at run time; the library only embeds them.
    for path in SOURCES.into_iter().chain(["csrc/guarded.h", "csrc/gloo", "link"]) {
        println!("cargo:rerun-if-changed={path}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .flag("-isystem")
        .flag(torch.join("include").display().to_string())
        .flag("-isystem")
        .flag(torch.join("include/torch/csrc/api/include").display().to_string())
        .flag("-isystem")
        .flag(site_packages.join("nvidia/cu13/include").display().to_string())
        .flag("-isystem")
        .flag(site_packages.join("nvidia/cu13/include/cccl").display().to_string())
        .flag("-isystem")
        .flag(site_packages.join("nvidia/nccl/include").display().to_string())
        // For csrc/gloo: libtorch contains Gloo but ships none of its headers.
        .include("csrc")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .define("USE_DISTRIBUTED", None)
        .define("USE_C10D_GLOO", None)
        .define("USE_C10D_NCCL", None)
        .files(SOURCES)
        .compile("cllm_csrc");
    for library in ["torch_cuda", "c10_cuda", "torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib={library}");
    }
    doctest_search_path(&torch.join("lib"));
    ExitCode::SUCCESS
}

fn embed_launcher() {
    let host = std::env::var("HOST");
    assert_eq!(host, std::env::var("TARGET"), "the launcher is this executable, so it must run on the target");
    let executable = std::env::current_exe().expect("a running program has a path");
    std::fs::copy(executable, out_dir().join("launcher")).expect("OUT_DIR is writable");
}

fn out_dir() -> PathBuf {
    PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
}

/// Doc tests do not see the run path, but cargo adds search paths inside OUT_DIR to their library
/// path.
fn doctest_search_path(lib: &Path) {
    let link = out_dir().join("libtorch");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(lib, &link).expect("OUT_DIR is writable");
    println!("cargo:rustc-link-search=native={}", link.display());
}
