//! Kernels compiled at run time (NVRTC) and put on libtorch's streams.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};

use tch::Tensor;

use super::checked;
use crate::{Error, Result};

unsafe extern "C" {
    fn cllm_compile(
        source: *const c_char,
        options: *const *const c_char,
        count: usize,
        code: *mut *mut c_char,
        size: *mut usize,
    ) -> c_int;
    fn cllm_capability(device: c_int, capability: *mut c_int) -> c_int;
    fn cllm_free(code: *mut c_char);
    fn cllm_module(device: c_int, code: *const c_char, module: *mut *mut c_void) -> c_int;
    fn cllm_kernel(module: *mut c_void, name: *const c_char, shared_bytes: c_int, kernel: *mut *mut c_void) -> c_int;
    fn cllm_launch(
        device: c_int,
        kernel: *mut c_void,
        grid: *const c_uint,
        threads: c_uint,
        shared_bytes: c_uint,
        overlap: c_int,
        arguments: *mut *mut c_void,
    ) -> c_int;
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::usage("text for the compiler holds a zero byte"))
}

/// Compiles CUDA C++ for `sm_{capability}` with these macros; needs no GPU.
///
/// # Errors
/// [`Error::Torch`] with the compiler's words, or where NVRTC is missing.
pub fn compile(source: &str, capability: (u32, u32), macros: &[(&str, String)]) -> Result<Vec<u8>> {
    let mut options = vec![format!("--gpu-architecture=sm_{}{}", capability.0, capability.1), "--std=c++17".to_owned()];
    options.extend(macros.iter().map(|(name, value)| format!("-D{name}={value}")));
    let options: Vec<CString> = options.iter().map(|option| c_string(option)).collect::<Result<_>>()?;
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let source = c_string(source)?;
    let (mut code, mut size) = (std::ptr::null_mut(), 0);
    // SAFETY: the strings outlive the call; on success `code` holds `size` bytes that this side frees.
    unsafe {
        checked(cllm_compile(source.as_ptr(), pointers.as_ptr(), pointers.len(), &mut code, &mut size))?;
        let bytes = std::slice::from_raw_parts(code.cast::<u8>(), size).to_vec();
        cllm_free(code);
        Ok(bytes)
    }
}

/// Major and minor compute capability of a CUDA device.
///
/// # Errors
/// [`Error::Torch`] where there is none.
pub fn compute_capability(device: usize) -> Result<(u32, u32)> {
    let mut found = [0; 2];
    // SAFETY: the array has room for both numbers.
    checked(unsafe { cllm_capability(device as c_int, found.as_mut_ptr()) })?;
    Ok((found[0].cast_unsigned(), found[1].cast_unsigned()))
}

/// Most shared memory of a block on devices of a compute capability, bytes (CUDA C++ programming guide, technical
/// specifications); 0 where there are no products of bf16.
pub fn max_shared_bytes(capability: (u32, u32)) -> usize {
    match capability {
        (0..=7, _) => 0,
        (8, 0 | 7) => 163 << 10,
        (8 | 12, _) => 99 << 10,
        _ => 227 << 10,
    }
}

/// Compiled code in the context of a CUDA device; it stays loaded as long as the process lives.
#[derive(Debug, Clone, Copy)]
pub struct Module {
    device: c_int,
    handle: *mut c_void,
}

thread_local! {
    /// Compiling takes a second or two, and the same is asked for again and again.
    static MODULES: RefCell<HashMap<(usize, String), Module>> = RefCell::new(HashMap::new());
}

/// One kernel of a [`Module`].
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    device: c_int,
    handle: *mut c_void,
    shared_bytes: usize,
    overlaps: bool,
}

/// What a kernel is given.
#[derive(Debug, Clone, Copy)]
pub enum Argument<'t> {
    /// The data of a tensor, which must be contiguous on the module's device.
    Data(&'t Tensor),
    /// The data of a tensor that may be missing: a null pointer then.
    MaybeData(Option<&'t Tensor>),
    /// A number.
    Int(i32),
    /// A number.
    Float(f32),
}

impl Module {
    /// Compiles and loads a source with these macros, once in a thread.
    ///
    /// # Errors
    /// [`Error::Torch`] with the words of the compiler or the driver.
    pub fn compiled(device: usize, source: &str, macros: &[(&str, String)]) -> Result<Self> {
        let key = (device, crate::fingerprint::hash_bytes(format!("{macros:?}{source}").as_bytes()));
        if let Some(known) = MODULES.with_borrow(|modules| modules.get(&key).copied()) {
            return Ok(known);
        }
        let module = Module::load(device, &compile(source, compute_capability(device)?, macros)?)?;
        MODULES.with_borrow_mut(|modules| modules.insert(key, module));
        Ok(module)
    }

    /// Loads what [`compile`] made.
    ///
    /// # Errors
    /// [`Error::Torch`] with the driver's words.
    pub fn load(device: usize, code: &[u8]) -> Result<Self> {
        let device = device as c_int;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the driver copies the code, whose header says how long it is.
        checked(unsafe { cllm_module(device, code.as_ptr().cast(), &mut handle) })?;
        Ok(Module { device, handle })
    }

    /// A kernel by its name. `shared_bytes`: dynamic shared memory of a block. `overlaps`: the kernel waits by itself for
    /// what runs before it (`griddepcontrol.wait`), so it may begin earlier.
    ///
    /// # Errors
    /// [`Error::Torch`] for a name that is not there or memory that the device lacks.
    pub fn kernel(&self, name: &str, shared_bytes: usize, overlaps: bool) -> Result<Kernel> {
        let mut handle = std::ptr::null_mut();
        let name = c_string(name)?;
        // SAFETY: the module is loaded and the name outlives the call.
        checked(unsafe { cllm_kernel(self.handle, name.as_ptr(), shared_bytes as c_int, &mut handle) })?;
        Ok(Kernel { device: self.device, handle, shared_bytes, overlaps })
    }
}

impl Kernel {
    /// Puts the kernel on the current stream of its device with `grid` blocks of `threads` threads.
    ///
    /// # Errors
    /// [`Error::Torch`] with the driver's words.
    ///
    /// # Safety
    /// The arguments must be those that the kernel's source declares, in their order, and the tensors as large as it
    /// reads and writes.
    pub unsafe fn launch(&self, grid: [usize; 2], threads: usize, arguments: &[Argument<'_>]) -> Result<()> {
        let mut values: Vec<u64> = arguments.iter().map(Argument::bits).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast::<c_void>()).collect();
        let grid = grid.map(|blocks| blocks as c_uint);
        // SAFETY: each pointer leads to the bits of its argument for the length of the call; the rest is the caller's word.
        checked(unsafe {
            cllm_launch(
                self.device,
                self.handle,
                grid.as_ptr(),
                threads as c_uint,
                self.shared_bytes as c_uint,
                c_int::from(self.overlaps),
                pointers.as_mut_ptr(),
            )
        })
    }
}

impl Argument<'_> {
    /// The argument's bits; a kernel reads as many of the low ones as its type has (little endian).
    fn bits(&self) -> u64 {
        match self {
            Argument::Data(tensor) | Argument::MaybeData(Some(tensor)) => {
                assert!(tensor.is_contiguous(), "kernels read contiguous tensors");
                tensor.data_ptr() as u64
            }
            Argument::MaybeData(None) => 0,
            Argument::Int(value) => u64::from(value.cast_unsigned()),
            Argument::Float(value) => u64::from(value.to_bits()),
        }
    }
}
