//! Link arguments with which a package's programs and tests find libtorch. Each `build.rs` includes
//! this file.

use std::path::PathBuf;

/// The `torch` folder of the wheel, as `.cargo/config.toml` names it.
pub fn folder() -> PathBuf {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Some(folder) = std::env::var_os("LIBTORCH").map(PathBuf::from) else {
        panic!("LIBTORCH is not set: build inside the checkout, where .cargo/config.toml sets it");
    };
    assert!(folder.join("lib/libtorch.so").exists(), "no libtorch in {}: run scripts/setup", folder.display());
    folder
}

/// Prints the link arguments. `libtorch.so` depends on the CUDA library, which rustc's
/// `--as-needed` would drop. The run path's first entries work from target/PROFILE and
/// target/PROFILE/deps of a checkout, wherever that is; the last one works for programs that
/// `cargo install` puts elsewhere.
pub fn link() {
    let lib = folder().join("lib");
    println!("cargo:rustc-link-arg=-Wl,--no-as-needed");
    println!("cargo:rustc-link-arg=-L{}", lib.display());
    println!("cargo:rustc-link-arg=-ltorch");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../../.libtorch/lib:$ORIGIN/../../../.libtorch/lib");
    let cache = lib.canonicalize().unwrap_or(lib);
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", cache.display());
}
