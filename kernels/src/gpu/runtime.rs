//! The source compiled on the machine that runs it, by hiprtc or NVRTC: for an architecture that no embedded object is
//! for. The two have the same functions under their own names.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::null_mut;

use super::driver::Maker;
use super::library::Library;
use super::objects;

type Program = *mut c_void;
type Code = c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> Code;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> Code;

/// The image for an architecture (`gfx942:sramecc+:xnack-`, `sm_90`). An error has the compiler's first words.
pub(super) fn compile(library: &Library, maker: Maker, architecture: &str) -> Result<Vec<u8>, String> {
    let names = match maker {
        Maker::Amd => [
            c"hiprtcCreateProgram",
            c"hiprtcCompileProgram",
            c"hiprtcGetProgramLogSize",
            c"hiprtcGetProgramLog",
            c"hiprtcGetCodeSize",
            c"hiprtcGetCode",
        ],
        Maker::Nvidia => [
            c"nvrtcCreateProgram",
            c"nvrtcCompileProgram",
            c"nvrtcGetProgramLogSize",
            c"nvrtcGetProgramLog",
            c"nvrtcGetCUBINSize",
            c"nvrtcGetCUBIN",
        ],
    };
    let options = match maker {
        Maker::Amd => vec![format!("--offload-arch={architecture}"), "-std=c++20".to_owned()],
        Maker::Nvidia => vec![
            format!("--gpu-architecture={architecture}"),
            "--std=c++17".to_owned(),
            // Lambdas are the host's otherwise, and there is no host.
            "--device-as-default-execution-space".to_owned(),
        ],
    };
    let (main, headers) = objects::source();
    let main = CString::new(main).map_err(|_| "a source with a zero")?;
    let options = texts(options.iter().map(String::as_str));
    let header_names = texts(headers.iter().map(|(name, _)| *name));
    let header_texts = texts(headers.iter().map(|(_, text)| *text));
    let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
    // SAFETY: the signatures of hiprtc.h and nvrtc.h; strings and arrays live until the last call.
    unsafe {
        let create: unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> Code = library.function(names[0])?;
        let compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code =
            library.function(names[1])?;
        let mut program = null_mut();
        let code = create(
            &mut program,
            main.as_ptr(),
            c"kernels.cu".as_ptr(),
            headers.len() as c_int,
            pointers(&header_texts).as_ptr(),
            pointers(&header_names).as_ptr(),
        );
        if code != 0 {
            return Err(format!("the compiler's error {code} before it began"));
        }
        // The program is never destroyed: this happens once in a process.
        let code = compile(program, options.len() as c_int, pointers(&options).as_ptr());
        let read = |size, get| {
            read(
                library.function::<Size>(size)?,
                library.function::<Get>(get)?,
                program,
            )
        };
        if code != 0 {
            let log = read(names[2], names[3])?;
            let log = String::from_utf8_lossy(&log);
            let error = log
                .lines()
                .find(|line| line.contains("error"))
                .unwrap_or("no message");
            return Err(format!("the compiler's error {code}: {error}"));
        }
        read(names[4], names[5])
    }
}

/// # Safety
/// `get` writes as many bytes as `size` tells.
unsafe fn read(size: Size, get: Get, program: Program) -> Result<Vec<u8>, String> {
    let mut bytes = 0;
    // SAFETY: a live program, a place for the number.
    let code = unsafe { size(program, &mut bytes) };
    let mut to = vec![0; bytes];
    // SAFETY: room for what it writes.
    let code = code | unsafe { get(program, to.as_mut_ptr().cast()) };
    match code {
        0 => Ok(to),
        code => Err(format!("the compiler gave nothing back: error {code}")),
    }
}

fn texts<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<CString> {
    texts
        .map(|text| CString::new(text).expect("a source without zeros"))
        .collect()
}
