//! The launcher: a process that restricts itself and then becomes Python, or runs queries. A process
//! cannot regain privileges that it has given up, so the restrictions hold for everything that it does
//! later.
//!
//! It is a crate of its own because it must not link libtorch, which takes longer to load than most
//! programs take to run. `cllm-core` embeds it as an executable: see its `build.rs`.

mod file_rules;
mod launch;
mod limits;
mod private_root;
mod protocol;
mod queries;
mod system_calls;

pub use launch::launch_if_requested;
pub use protocol::{DatabaseSource, Greeting, LaunchOrder, Limits, PythonOrder, QueryLimits, QueryReply, QueryRequest};
