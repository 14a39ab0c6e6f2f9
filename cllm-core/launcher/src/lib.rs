//! The launcher: a process that restricts itself and then becomes Python. A process cannot regain
//! privileges that it has given up, so the restrictions hold for everything that Python does.
//!
//! It is a crate of its own because it must not link libtorch, which takes longer to load than most
//! programs take to run. `cllm-core` embeds it as an executable: see its `build.rs`.

mod launch;
mod private_root;
mod protocol;
mod system_calls;

pub use launch::launch_if_requested;
pub use protocol::{Greeting, LaunchOrder, Limits};
