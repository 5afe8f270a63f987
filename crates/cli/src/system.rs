//! What is set once per process: threads, the interrupt's exit code.

use crate::failure::{Failure, Result};

/// An interrupt (Ctrl-C) ends the process with code 130. Nothing is cleaned up, and nothing has to
/// be: outputs appear whole or not at all, and journals survive a kill.
pub fn exit_130_on_interrupt() {
    #[cfg(unix)]
    {
        extern "C" fn interrupted(_: libc::c_int) {
            const TEXT: &[u8] = b"\ninterrupted\n";
            // SAFETY: write and _exit may be called in a signal handler; the buffer is static.
            unsafe {
                libc::write(2, TEXT.as_ptr().cast(), TEXT.len());
                libc::_exit(130);
            }
        }
        let handler = interrupted as extern "C" fn(libc::c_int);
        // SAFETY: the handler calls only functions that are safe in signal handlers.
        unsafe { libc::signal(libc::SIGINT, handler as libc::sighandler_t) };
    }
}

/// Limits the worker threads; `None` uses all cores.
pub fn use_threads(threads: Option<usize>) -> Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    if threads == 0 {
        return Err(Failure::error("--threads 0 would do nothing; give at least 1"));
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    Ok(())
}
