//! Shared libraries that are opened at run time: a program that was built for the CPU starts without them. Not here: what
//! their functions are.

use std::ffi::{CStr, CString, c_void};

/// Stays open as long as the process: what was taken from it is used until then.
pub(crate) struct Library {
    handle: *mut c_void,
    name: String,
}

// SAFETY: a handle of dlopen is the process's and is never closed; dlsym may be called from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// What the process has loaded anyway.
    pub fn of_the_process() -> Library {
        Library {
            handle: libc::RTLD_DEFAULT,
            name: "this process".to_owned(),
        }
    }

    /// The first that opens.
    pub fn open(names: &[&str]) -> Result<Library, String> {
        let mut why = String::new();
        for &name in names {
            let c_name = CString::new(name).map_err(|_| format!("a library's name {name:?}"))?;
            // SAFETY: a string that ends. What runs when a driver is loaded is the driver's.
            let handle = unsafe { libc::dlopen(c_name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
            if !handle.is_null() {
                let name = name.to_owned();
                return Ok(Library { handle, name });
            }
            // SAFETY: asked right after a failure, on the same thread; it is copied at once.
            let told = unsafe { libc::dlerror() };
            if !told.is_null() {
                // SAFETY: dlerror's text ends.
                why = unsafe { CStr::from_ptr(told) }.to_string_lossy().into_owned();
            }
        }
        Err(format!("none of {} opens: {why}", names.join(", ")))
    }

    pub fn has(&self, name: &CStr) -> bool {
        !self.address(name).is_null()
    }

    /// A function, as the type that the caller gives it.
    ///
    /// # Safety
    /// `F` is a function pointer of the C ABI with the arguments and the result that the library documents under this name.
    pub unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F, String> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        let address = self.address(name);
        if address.is_null() {
            return Err(format!("{} has no {}", self.name, name.to_string_lossy()));
        }
        // SAFETY: of the same size; that it is of this type is the caller's to know.
        Ok(unsafe { std::mem::transmute_copy(&address) })
    }

    fn address(&self, name: &CStr) -> *mut c_void {
        // SAFETY: a handle of dlopen that is never closed, or the one for all; a string that ends.
        unsafe { libc::dlsym(self.handle, name.as_ptr()) }
    }
}
