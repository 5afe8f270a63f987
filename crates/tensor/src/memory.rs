//! The allocator's thresholds, set once by a binary at its start.

/// Keeps freed memory in the process instead of giving it back to the system after every large
/// buffer: a training step frees and allocates the same buffers again and again, and page faults
/// otherwise take a third of it. Call once at the start of `main`, before other threads run. Does
/// nothing on systems other than Linux with glibc.
pub fn tune_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        const TRIM_THRESHOLD: i32 = -1;
        const TOP_PAD: i32 = -2;
        const MMAP_THRESHOLD: i32 = -3;
        // SAFETY: glibc's own function with documented parameters; it takes its own lock.
        unsafe {
            mallopt(MMAP_THRESHOLD, i32::MAX);
            mallopt(TRIM_THRESHOLD, i32::MAX);
            mallopt(TOP_PAD, 64 << 20);
        }
    }
}
