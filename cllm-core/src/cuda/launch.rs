//! Kernels with declared signatures. A [`Signature`] repeats the parameters in a kernel's source
//! and adds what the source cannot express: how many elements it reads and writes behind each
//! pointer, as a function of some sizes. A launch checks every tensor against it (device, type,
//! contiguity, alignment, number of elements), and works out the grid and all counts itself, so the
//! only mistakes left to a caller are indices inside tensors. Graphs are checked while they are
//! captured, and replayed without checks.

use std::ffi::{c_int, c_uint, c_void};
use std::fmt::{self, Display, Formatter};

use tch::{Device, Kind, Tensor};

use super::checked;
use super::nvrtc::Module;
use crate::{Error, Result};

unsafe extern "C" {
    fn cllm_launch(
        device: c_int,
        kernel: *mut c_void,
        grid: *const c_uint,
        cluster_blocks: c_uint,
        num_threads: c_uint,
        shared_bytes: c_uint,
        overlaps: c_int,
        arguments: *mut *mut c_void,
    ) -> c_int;
    fn cllm_max_clusters(
        device: c_int,
        kernel: *mut c_void,
        cluster_blocks: c_uint,
        num_threads: c_uint,
        shared_bytes: c_uint,
        count: *mut c_int,
    ) -> c_int;
    fn cllm_tensor_map(first: *mut c_void, sizes: *const u64, tile_rows: u32, map: *mut c_void) -> c_int;
}

/// The declaration of a kernel. `Sizes` holds everything that its grid and arguments depend on.
pub(super) struct Signature<Sizes: 'static> {
    pub(super) name: &'static str,
    /// Number of blocks in both dimensions.
    pub(super) grid: fn(&Sizes) -> [usize; 2],
    /// Number of threads of a block.
    pub(super) threads: fn(&Sizes) -> usize,
    /// In groups, so that kernels can share some.
    pub(super) params: &'static [&'static [Param<Sizes>]],
}

/// One parameter of a kernel.
pub(super) struct Param<Sizes> {
    name: &'static str,
    value: Value<Sizes>,
}

enum Value<Sizes> {
    Pointer(Pointer<Sizes>),
    /// A tensor map: how the copy engine of Hopper finds tiles of a bfloat16 tensor.
    Tiles(Tiles<Sizes>),
    /// A number that follows from the sizes, so a launch has no argument for it.
    Count(fn(&Sizes) -> usize),
    Int,
    Long,
    Float,
}

struct Tiles<Sizes> {
    tensor_sizes: fn(&Sizes) -> [usize; 3],
    /// Rows of a tile.
    rows: fn(&Sizes) -> usize,
    is_nullable: bool,
}

struct Pointer<Sizes> {
    /// Type of the elements in the source.
    c_type: &'static str,
    kind: Kind,
    align_bytes: fn(&Sizes) -> usize,
    is_nullable: bool,
    num_elements: fn(&Sizes) -> usize,
}

impl<Sizes> Param<Sizes> {
    const fn pointer(
        name: &'static str,
        (c_type, kind): (&'static str, Kind),
        align_bytes: fn(&Sizes) -> usize,
        num_elements: fn(&Sizes) -> usize,
    ) -> Self {
        let pointer = Pointer { c_type, kind, align_bytes, is_nullable: false, num_elements };
        Param { name, value: Value::Pointer(pointer) }
    }
}

/// Marks a pointer that may be null, or a tensor map that may be all zeros.
pub(super) const fn nullable<Sizes>(mut param: Param<Sizes>) -> Param<Sizes> {
    match &mut param.value {
        Value::Pointer(pointer) => pointer.is_nullable = true,
        Value::Tiles(tiles) => tiles.is_nullable = true,
        _ => (),
    }
    param
}

/// Sets the alignment of the first element.
pub(super) const fn aligned<Sizes>(align_bytes: fn(&Sizes) -> usize, mut param: Param<Sizes>) -> Param<Sizes> {
    if let Value::Pointer(pointer) = &mut param.value {
        pointer.align_bytes = align_bytes;
    }
    param
}

/// Writes the parameter as the source declares it.
impl<Sizes> Display for Param<Sizes> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.value {
            Value::Pointer(pointer) => write!(f, "{} *{}", pointer.c_type, self.name),
            Value::Tiles(_) => write!(f, "__grid_constant__ TensorMap {}", self.name),
            Value::Count(_) | Value::Int => write!(f, "int {}", self.name),
            Value::Long => write!(f, "long long {}", self.name),
            Value::Float => write!(f, "float {}", self.name),
        }
    }
}

/// bfloat16. Kernels read 16 bytes at a time unless [`aligned`] says less.
pub(super) const fn bf16<Sizes>(name: &'static str, num_elements: fn(&Sizes) -> usize) -> Param<Sizes> {
    Param::pointer(name, ("bf16", Kind::BFloat16), |_| 16, num_elements)
}

pub(super) const fn float32<Sizes>(name: &'static str, num_elements: fn(&Sizes) -> usize) -> Param<Sizes> {
    Param::pointer(name, ("float", Kind::Float), |_| 4, num_elements)
}

pub(super) const fn int32<Sizes>(name: &'static str, num_elements: fn(&Sizes) -> usize) -> Param<Sizes> {
    Param::pointer(name, ("int", Kind::Int), |_| 4, num_elements)
}

pub(super) const fn int64<Sizes>(name: &'static str, num_elements: fn(&Sizes) -> usize) -> Param<Sizes> {
    Param::pointer(name, ("long long", Kind::Int64), |_| 8, num_elements)
}

/// Unsigned 64-bit numbers, in an int32 tensor with two elements for each: libtorch has no
/// arithmetic for them.
pub(super) const fn uint64<Sizes>(name: &'static str, num_ints: fn(&Sizes) -> usize) -> Param<Sizes> {
    Param::pointer(name, ("u64", Kind::Int), |_| 8, num_ints)
}

/// Tiles of so many rows (at most 256), at most 64 columns wide, of a bfloat16 tensor `[rows, groups,
/// columns]` whose number of columns is a multiple of 8. A tile is within one group.
pub(super) const fn tiles<Sizes>(
    name: &'static str,
    tensor_sizes: fn(&Sizes) -> [usize; 3],
    rows: fn(&Sizes) -> usize,
) -> Param<Sizes> {
    Param { name, value: Value::Tiles(Tiles { tensor_sizes, rows, is_nullable: false }) }
}

pub(super) const fn count<Sizes>(name: &'static str, value: fn(&Sizes) -> usize) -> Param<Sizes> {
    Param { name, value: Value::Count(value) }
}

pub(super) const fn int<Sizes>(name: &'static str) -> Param<Sizes> {
    Param { name, value: Value::Int }
}

pub(super) const fn long<Sizes>(name: &'static str) -> Param<Sizes> {
    Param { name, value: Value::Long }
}

pub(super) const fn float<Sizes>(name: &'static str) -> Param<Sizes> {
    Param { name, value: Value::Float }
}

/// The argument for a parameter.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument<'t> {
    Tensor(&'t Tensor),
    /// A null pointer if there is no tensor.
    Optional(Option<&'t Tensor>),
    Int(i32),
    Long(i64),
    Float(f32),
}

/// The bits of a parameter. A kernel reads only as many of the first ones as the parameter's type
/// has (little endian). Tensor maps need all, and this alignment.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bits([u64; 16]);

impl From<u64> for Bits {
    fn from(number: u64) -> Self {
        let mut bits = Bits([0; 16]);
        bits.0[0] = number;
        bits
    }
}

/// A kernel that is loaded on a device.
pub(super) struct Kernel<Sizes: 'static> {
    signature: &'static Signature<Sizes>,
    device: Device,
    handle: *mut c_void,
    shared_bytes: usize,
    overlaps: bool,
}

impl<Sizes> Kernel<Sizes> {
    /// The kernel of a signature. `suffix` is added to its name. Its blocks get `shared_bytes` of
    /// dynamic shared memory. With `overlaps` it may start before the kernel in front of it ends,
    /// and waits for it by itself (`griddepcontrol.wait`).
    ///
    /// # Errors
    /// [`Error::Torch`] if the module has no such kernel, or if the device has less shared memory.
    pub(super) fn new(
        module: &Module,
        signature: &'static Signature<Sizes>,
        suffix: &str,
        shared_bytes: usize,
        overlaps: bool,
    ) -> Result<Self> {
        let handle = module.kernel(&format!("{}{suffix}", signature.name), shared_bytes)?;
        Ok(Kernel { signature, device: Device::Cuda(module.device), handle, shared_bytes, overlaps })
    }

    /// Puts the kernel on the current stream of its device. There is one argument for each
    /// parameter except the counts.
    ///
    /// # Errors
    /// [`Error::Internal`] if an argument does not match the signature, else [`Error::Torch`] with
    /// the driver's message.
    ///
    /// # Safety
    /// Tensors of indices (tokens, rows, slots, positions, tiles) hold only indices inside the
    /// tensors that they index.
    pub(super) unsafe fn launch(&self, sizes: &Sizes, arguments: &[Argument<'_>]) -> Result<()> {
        // SAFETY: as here.
        unsafe { self.launch_clusters(sizes, 1, arguments) }
    }

    /// Like [`launch`](Self::launch), with clusters of this many blocks along the first dimension of
    /// the grid. GPUs before Hopper have none of more than one block.
    ///
    /// # Errors
    /// As for `launch`.
    ///
    /// # Safety
    /// As for `launch`.
    pub(super) unsafe fn launch_clusters(
        &self,
        sizes: &Sizes,
        cluster_blocks: usize,
        arguments: &[Argument<'_>],
    ) -> Result<()> {
        let Device::Cuda(device) = self.device else { return Err(Error::internal("kernels run only on GPUs")) };
        let mut values = self.values(sizes, arguments)?;
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast::<c_void>()).collect();
        let grid = (self.signature.grid)(sizes).map(|blocks| blocks as c_uint);
        // SAFETY: each pointer leads to the value of one parameter, for the length of the call. The
        // tensors were checked against the signature, which a test compares with the source; the
        // caller vouches for the indices.
        checked(unsafe {
            cllm_launch(
                device as c_int,
                self.handle,
                grid.as_ptr(),
                cluster_blocks as c_uint,
                (self.signature.threads)(sizes) as c_uint,
                self.shared_bytes as c_uint,
                c_int::from(self.overlaps),
                pointers.as_mut_ptr(),
            )
        })
    }

    /// How many clusters of this many blocks run at the same time on an otherwise idle device.
    ///
    /// # Errors
    /// [`Error::Torch`] with the driver's message.
    pub(super) fn max_clusters(&self, sizes: &Sizes, cluster_blocks: usize) -> Result<usize> {
        let Device::Cuda(device) = self.device else { return Err(Error::internal("kernels run only on GPUs")) };
        let (num_threads, mut count) = ((self.signature.threads)(sizes), 0);
        // SAFETY: the kernel is loaded, and the function writes one number.
        checked(unsafe {
            cllm_max_clusters(
                device as c_int,
                self.handle,
                cluster_blocks as c_uint,
                num_threads as c_uint,
                self.shared_bytes as c_uint,
                &mut count,
            )
        })?;
        Ok(count as usize)
    }

    fn values(&self, sizes: &Sizes, arguments: &[Argument<'_>]) -> Result<Vec<Bits>> {
        let mut rest = arguments.iter();
        let values = self.signature.params.iter().flat_map(|group| group.iter()).map(|param| {
            if let Value::Count(value) = param.value {
                let value = u32::try_from(value(sizes)).map_err(|_| self.mismatch(param, "is too large"))?;
                return Ok(Bits::from(u64::from(value)));
            }
            match (&param.value, rest.next()) {
                (Value::Pointer(pointer), Some(Argument::Tensor(tensor) | Argument::Optional(Some(tensor)))) => {
                    let Pointer { kind, align_bytes, num_elements, .. } = *pointer;
                    check(tensor, kind, align_bytes(sizes), num_elements(sizes), self.device)
                        .map(Bits::from)
                        .map_err(|problem| self.mismatch(param, &problem))
                }
                (Value::Tiles(tiles), Some(Argument::Tensor(tensor) | Argument::Optional(Some(tensor)))) => {
                    let tensor_sizes = (tiles.tensor_sizes)(sizes);
                    check(tensor, Kind::BFloat16, 16, tensor_sizes.iter().product(), self.device)
                        .map_err(|problem| self.mismatch(param, &problem))
                        .and_then(|address| tensor_map(address, tensor_sizes, (tiles.rows)(sizes)))
                }
                (
                    Value::Pointer(Pointer { is_nullable: true, .. }) | Value::Tiles(Tiles { is_nullable: true, .. }),
                    Some(Argument::Optional(None)),
                ) => Ok(Bits::from(0)),
                (Value::Int, Some(Argument::Int(value))) => Ok(Bits::from(u64::from(value.cast_unsigned()))),
                (Value::Long, Some(Argument::Long(value))) => Ok(Bits::from(value.cast_unsigned())),
                (Value::Float, Some(Argument::Float(value))) => Ok(Bits::from(u64::from(value.to_bits()))),
                (_, argument) => Err(self.mismatch(param, &format!("cannot be {argument:?}"))),
            }
        });
        let values = values.collect::<Result<_>>()?;
        match rest.next() {
            None => Ok(values),
            Some(argument) => Err(Error::internal(format!("kernel {}: unexpected {argument:?}", self.signature.name))),
        }
    }

    fn mismatch(&self, param: &Param<Sizes>, problem: &str) -> Error {
        Error::internal(format!("kernel {}: argument `{param}` {problem}", self.signature.name))
    }
}

/// The tensor map of a bfloat16 tensor at an address, for tiles of so many rows.
fn tensor_map(address: u64, sizes: [usize; 3], tile_rows: usize) -> Result<Bits> {
    let (sizes, mut map) = (sizes.map(|size| size as u64), Bits::from(0));
    // SAFETY: there are three sizes, and `map` has the size and alignment of a tensor map. The
    // address is only written down.
    checked(unsafe {
        cllm_tensor_map(
            address as *mut c_void,
            sizes.as_ptr(),
            tile_rows as u32,
            std::ptr::from_mut(&mut map).cast::<c_void>(),
        )
    })?;
    Ok(map)
}

/// Checks a tensor against what a parameter needs and returns the address of its elements.
fn check(
    tensor: &Tensor,
    kind: Kind,
    align_bytes: usize,
    num_elements: usize,
    device: Device,
) -> std::result::Result<u64, String> {
    if tensor.device() != device {
        return Err(format!("is on {:?}: expected {device:?}", tensor.device()));
    }
    if tensor.kind() != kind || tensor.numel() != num_elements || !tensor.is_contiguous() {
        let layout = if tensor.is_contiguous() { "" } else { ", not contiguous" };
        let actual = format!("{:?} {:?}{layout}", tensor.kind(), tensor.size());
        return Err(format!("is {actual}: expected {num_elements} contiguous elements of {kind:?}"));
    }
    let address = tensor.data_ptr() as u64;
    if !address.is_multiple_of(align_bytes as u64) {
        return Err(format!("does not start at a multiple of {align_bytes} bytes"));
    }
    Ok(address)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Fails unless the source declares a kernel of this name with these parameters. A macro
    /// completes a name that ends in `_`.
    pub(crate) fn assert_declared<Sizes>(source: &str, signature: &Signature<Sizes>) {
        let source = source.replace("\\\n", " ").replace('\n', " ");
        let name = format!(" {}{}(", signature.name, if signature.name.ends_with('_') { "##NT" } else { "" });
        // Calls do not end in a body.
        let declarations: Vec<&str> = source
            .match_indices(&name)
            .filter_map(|(index, _)| source[index + name.len()..].split_once(')'))
            .filter_map(|(params, rest)| rest.trim_start().starts_with('{').then_some(params))
            .collect();
        let [params] = declarations[..] else { panic!("{name}: {} declarations in the source", declarations.len()) };
        let params = params.split(',');
        let declared: Vec<String> = params
            .map(|param| param.split_whitespace().filter(|word| *word != "const").collect::<Vec<_>>().join(" "))
            .collect();
        let params = signature.params.iter().flat_map(|group| group.iter());
        let expected: Vec<String> = params.map(ToString::to_string).collect();
        assert_eq!(declared, expected, "{}", signature.name);
    }

    struct Sizes {
        rows: usize,
    }

    const SIGNATURE: Signature<Sizes> = Signature {
        name: "scale",
        grid: |sizes| [sizes.rows, 1],
        threads: |_| 32,
        params: &[
            &[bf16("x", |sizes| sizes.rows * 8), nullable(int32("row", |sizes| sizes.rows))],
            &[count("rows", |sizes| sizes.rows), float("factor")],
        ],
    };

    /// The values that a kernel gets, if tensors were expected on the CPU.
    fn values(arguments: &[Argument<'_>]) -> Result<Vec<Bits>> {
        let (device, handle) = (Device::Cpu, std::ptr::null_mut());
        Kernel { signature: &SIGNATURE, device, handle, shared_bytes: 0, overlaps: false }
            .values(&Sizes { rows: 2 }, arguments)
    }

    #[test]
    fn arguments_that_are_not_as_declared_are_refused() {
        let zeros = |count: i64, kind| Tensor::zeros([count], (kind, Device::Cpu));
        let (x, rows) = (zeros(24, Kind::BFloat16), zeros(2, Kind::Int));
        let (row, factor) = (Argument::Optional(Some(&rows)), Argument::Float(1.0));
        let whole = x.narrow(0, 0, 16);
        let address = |tensor: &Tensor| tensor.data_ptr() as u64;
        let expected = [address(&x), address(&rows), 2, u64::from(1f32.to_bits())].map(Bits::from).to_vec();
        assert_eq!(values(&[Argument::Tensor(&whole), row, factor]).unwrap(), expected);
        assert_eq!(values(&[Argument::Tensor(&whole), Argument::Optional(None), factor]).unwrap()[1], Bits::from(0));
        for (tensor, problem) in [
            (x.shallow_clone(), "`bf16 *x` is BFloat16 [24]: expected 16 contiguous elements of BFloat16"),
            (zeros(16, Kind::Half), "`bf16 *x` is Half [16]: expected"),
            (zeros(32, Kind::BFloat16).slice(0, 0, 32, 2), "`bf16 *x` is BFloat16 [16], not contiguous: expected"),
            (x.narrow(0, 1, 16), "`bf16 *x` does not start at a multiple of 16 bytes"),
        ] {
            let error = values(&[Argument::Tensor(&tensor), row, factor]).unwrap_err().to_string();
            assert!(error.contains(&format!("kernel scale: argument {problem}")), "{error}");
        }
        let whole = Argument::Tensor(&whole);
        for arguments in [
            &[] as &[_],
            &[whole, row],
            &[row, whole, factor],
            &[Argument::Optional(None), row, factor],
            &[whole, row, Argument::Int(1)],
            &[whole, row, factor, factor],
        ] {
            assert!(matches!(values(arguments), Err(Error::Internal(_))), "{arguments:?}");
        }
    }

    #[test]
    fn a_signature_must_match_the_source() {
        let source =
            "extern \"C\" __global__ void scale(const bf16 *x,\n   const int *row, int rows, float factor) { }";
        assert_declared(source, &SIGNATURE);
    }
}
