//! Links libtorch.

#[path = "../cllm-core/link/libtorch.rs"]
mod libtorch;

fn main() {
    libtorch::link();
}
