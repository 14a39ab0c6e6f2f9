//! The store at which the processes of a run meet: c10d's TCP store (csrc/distributed.cpp), which
//! maps keys to texts and counters.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::time::Duration;

use super::checked;
use crate::{Error, Result};

unsafe extern "C" {
    fn cllm_store_new(
        host: *const c_char,
        port: c_int,
        serves: c_int,
        prefix: *const c_char,
        timeout_ms: i64,
        store: *mut *mut c_void,
    ) -> c_int;
    fn cllm_store_set(store: *mut c_void, key: *const c_char, value: *const c_char) -> c_int;
    fn cllm_store_get(store: *mut c_void, key: *const c_char, value: *mut *const c_char) -> c_int;
    fn cllm_store_add(store: *mut c_void, key: *const c_char, amount: i64, sum: *mut i64) -> c_int;
    fn cllm_store_wait(store: *mut c_void, key: *const c_char, timeout_ms: i64) -> c_int;
    fn cllm_store_free(store: *mut c_void);
}

/// Where the store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    pub host: String,
    pub port: u16,
    /// Whether this process serves the store.
    pub serves: bool,
    /// Prefix of the store's keys.
    pub prefix: String,
}

/// A connection to the store. Threads that share it wait for one another.
pub struct Store {
    pub(super) handle: *mut c_void,
}

// SAFETY: every operation of c10d's TCPStore holds the connection's own lock.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Connects to the store, and serves it if `rendezvous` says so. If nobody serves it yet, this
    /// waits, at most for `timeout`.
    ///
    /// # Errors
    /// [`Error::Torch`] if the store cannot be reached in time; below, if the connection broke.
    pub fn connect(rendezvous: &Rendezvous, timeout: Duration) -> Result<Self> {
        let Rendezvous { host, port, serves, prefix } = rendezvous;
        let (host, prefix) = (c_string(host)?, c_string(prefix)?);
        let mut handle = std::ptr::null_mut();
        // SAFETY: the strings outlive the call. On success the connection belongs to this side.
        checked(unsafe {
            cllm_store_new(
                host.as_ptr(),
                c_int::from(*port),
                c_int::from(*serves),
                prefix.as_ptr(),
                timeout.as_millis() as i64,
                &mut handle,
            )
        })?;
        Ok(Store { handle })
    }

    pub fn set(&self, key: &str, value: &str) -> Result<()> {
        let (key, value) = (c_string(key)?, c_string(value)?);
        // SAFETY: the connection is valid, and the strings outlive the call; here and below.
        checked(unsafe { cllm_store_set(self.handle, key.as_ptr(), value.as_ptr()) })
    }

    /// The value of a key, if anyone has set it.
    pub fn get(&self, key: &str) -> Result<Option<String>> {
        let key = c_string(key)?;
        let mut value = std::ptr::null();
        checked(unsafe { cllm_store_get(self.handle, key.as_ptr(), &mut value) })?;
        if value.is_null() {
            return Ok(None);
        }
        // SAFETY: the value is a NUL-terminated string of this thread, valid until its next call.
        Ok(Some(unsafe { CStr::from_ptr(value) }.to_string_lossy().into_owned()))
    }

    /// Adds to a counter, which begins at 0, and returns the sum.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64> {
        let key = c_string(key)?;
        let mut sum = 0;
        checked(unsafe { cllm_store_add(self.handle, key.as_ptr(), amount, &mut sum) })?;
        Ok(sum)
    }

    /// Waits until anyone has set the key, at most for `timeout`.
    ///
    /// # Errors
    /// Also when nobody has set it in time.
    pub fn wait(&self, key: &str, timeout: Duration) -> Result<()> {
        let key = c_string(key)?;
        checked(unsafe { cllm_store_wait(self.handle, key.as_ptr(), timeout.as_millis() as i64) })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the connection was made by `cllm_store_new` and is freed once.
        unsafe { cllm_store_free(self.handle) }
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::internal(format!("`{text}` contains a zero byte")))
}
