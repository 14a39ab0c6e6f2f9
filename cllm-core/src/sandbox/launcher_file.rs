//! The launcher's executable, which is part of this program, as a file that can be started.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::OnceLock;

use nix::libc::MFD_EXEC;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{Error, Result};

const EXECUTABLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/launcher"));

/// A file in memory, so that no folder must permit executables and nothing is left behind.
#[derive(Debug)]
pub(crate) struct LauncherFile(File);

static SHARED: OnceLock<LauncherFile> = OnceLock::new();

impl LauncherFile {
    /// The one file of this process.
    pub(crate) fn shared() -> Result<&'static Self> {
        match SHARED.get() {
            Some(file) => Ok(file),
            None => {
                let file = LauncherFile::create()?;
                Ok(SHARED.get_or_init(|| file))
            }
        }
    }

    fn create() -> Result<Self> {
        let failed = |error| Error::environment(format!("the launcher of the sandbox has no file in memory: {error}"));
        let create = |flags| memfd_create("cllm-launcher", flags);
        // Kernels before 6.3 do not know the flag.
        let file = create(MFdFlags::MFD_CLOEXEC | MFdFlags::from_bits_retain(MFD_EXEC))
            .or_else(|_| create(MFdFlags::MFD_CLOEXEC))
            .map_err(|error| failed(error.into()))?;
        let mut file = File::from(file);
        file.write_all(EXECUTABLE).map_err(failed)?;
        Ok(LauncherFile(file))
    }

    /// The path by which any process of this user finds it.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }
}
