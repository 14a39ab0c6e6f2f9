//! Compiles CUDA C++ at run time (NVRTC) and loads the machine code into the context of a device.
//! Compiling at run time lets kernels be specialised for a model's shape, and lets the toolkit be
//! built without a CUDA compiler.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};

use super::checked;
use crate::{Error, Result};

unsafe extern "C" {
    fn cllm_compile(
        source: *const c_char,
        options: *const *const c_char,
        num_options: usize,
        code: *mut *mut c_char,
        code_bytes: *mut usize,
    ) -> c_int;
    fn cllm_free_code(code: *mut c_char);
    fn cllm_compute_capability(device: c_int, capability: *mut c_int) -> c_int;
    fn cllm_num_multiprocessors(device: c_int, count: *mut c_int) -> c_int;
    fn cllm_load_module(device: c_int, code: *const c_char, module: *mut *mut c_void) -> c_int;
    fn cllm_get_kernel(
        module: *mut c_void,
        name: *const c_char,
        shared_bytes: c_int,
        kernel: *mut *mut c_void,
    ) -> c_int;
}

/// Compute capability of Hopper.
pub(super) const HOPPER: (u32, u32) = (9, 0);

/// Preprocessor macros: names and values.
pub(super) type Macros = Vec<(&'static str, String)>;

/// Machine code for GPUs of one compute capability (an ELF file).
pub(super) struct MachineCode(Vec<u8>);

#[cfg(test)]
impl MachineCode {
    pub(super) fn is_elf(&self) -> bool {
        self.0.starts_with(b"\x7fELF")
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::internal("text for the CUDA compiler contains a zero byte"))
}

/// Compiles CUDA C++ for a compute capability. Needs no GPU.
///
/// # Errors
/// [`Error::Torch`] with the compiler's message, or if NVRTC is missing.
pub(super) fn compile(source: &str, capability: (u32, u32), macros: &Macros) -> Result<MachineCode> {
    // The "a" adds what only this architecture has, such as wgmma.
    let suffix = if capability == HOPPER { "a" } else { "" };
    let architecture = format!("--gpu-architecture=sm_{}{}{suffix}", capability.0, capability.1);
    let mut options = vec![architecture, "--std=c++17".to_owned()];
    options.extend(macros.iter().map(|(name, value)| format!("-D{name}={value}")));
    let options: Vec<CString> = options.iter().map(|option| c_string(option)).collect::<Result<_>>()?;
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let source = c_string(source)?;
    let (mut code, mut code_bytes) = (std::ptr::null_mut(), 0);
    // SAFETY: the strings outlive the call. On success `code` points to `code_bytes` bytes, which
    // are freed once.
    unsafe {
        checked(cllm_compile(source.as_ptr(), pointers.as_ptr(), pointers.len(), &mut code, &mut code_bytes))?;
        let bytes = std::slice::from_raw_parts(code.cast::<u8>(), code_bytes).to_vec();
        cllm_free_code(code);
        Ok(MachineCode(bytes))
    }
}

/// Major and minor compute capability of a CUDA device.
///
/// # Errors
/// [`Error::Torch`] if there is no such device.
pub fn compute_capability(device: usize) -> Result<(u32, u32)> {
    let mut capability = [0; 2];
    // SAFETY: the array has room for both numbers.
    checked(unsafe { cllm_compute_capability(device as c_int, capability.as_mut_ptr()) })?;
    Ok((capability[0].cast_unsigned(), capability[1].cast_unsigned()))
}

/// Number of multiprocessors of a CUDA device.
///
/// # Errors
/// [`Error::Torch`] if there is no such device.
pub(super) fn num_multiprocessors(device: usize) -> Result<usize> {
    let mut count = 0;
    // SAFETY: the function writes one number.
    checked(unsafe { cllm_num_multiprocessors(device as c_int, &mut count) })?;
    Ok(count as usize)
}

/// Maximum shared memory of a block, in bytes, by compute capability (CUDA C++ programming guide,
/// technical specifications). 0 for GPUs whose tensor cores do not support bfloat16.
pub fn max_shared_bytes(capability: (u32, u32)) -> usize {
    match capability {
        (0..=7, _) => 0,
        (8, 0 | 7) => 163 << 10,
        (8 | 12, _) => 99 << 10,
        _ => 227 << 10,
    }
}

/// Machine code that is loaded into the context of a device. It stays loaded until the process
/// ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Module {
    pub(super) device: usize,
    handle: *mut c_void,
}

thread_local! {
    /// Compiling is slow (a second or two), and several decoders of one program ask for the same
    /// module.
    static MODULES: RefCell<HashMap<(usize, String), Module>> = RefCell::new(HashMap::new());
}

impl Module {
    /// Compiles and loads a source for a device, once per thread.
    ///
    /// # Errors
    /// [`Error::Torch`] with the message of the compiler or the driver.
    pub(super) fn compiled(device: usize, source: &str, macros: &Macros) -> Result<Self> {
        let key = (device, crate::fingerprint::hash_bytes(format!("{macros:?}{source}").as_bytes()));
        if let Some(module) = MODULES.with_borrow(|modules| modules.get(&key).copied()) {
            return Ok(module);
        }
        let module = Module::load(device, &compile(source, compute_capability(device)?, macros)?)?;
        MODULES.with_borrow_mut(|modules| modules.insert(key, module));
        Ok(module)
    }

    fn load(device: usize, code: &MachineCode) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the driver copies the code and reads its length from the header; only the
        // compiler makes `MachineCode`.
        checked(unsafe { cllm_load_module(device as c_int, code.0.as_ptr().cast(), &mut handle) })?;
        Ok(Module { device, handle })
    }

    /// The driver's handle of a kernel, whose blocks may use this much dynamic shared memory.
    ///
    /// # Errors
    /// [`Error::Torch`] if there is no kernel of this name, or if the device has less shared
    /// memory.
    pub(super) fn kernel(&self, name: &str, shared_bytes: usize) -> Result<*mut c_void> {
        let mut handle = std::ptr::null_mut();
        let name = c_string(name)?;
        // SAFETY: the module is loaded, and the name outlives the call.
        checked(unsafe { cllm_get_kernel(self.handle, name.as_ptr(), shared_bytes as c_int, &mut handle) })?;
        Ok(handle)
    }
}
