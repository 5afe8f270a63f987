//! probe
use rayon::prelude::*;
use std::time::Instant;
#[derive(Clone, Copy)]
struct P(*mut f32);
unsafe impl Send for P {}
unsafe impl Sync for P {}
impl P { fn at(self, o: usize) -> *mut f32 { self.0.wrapping_add(o) } }
type S = (usize, usize);
unsafe fn g(m: usize, n: usize, k: usize, c: *mut f32, cr: usize, a: *const f32, (ar, ac): S, b: *const f32, (br, bc): S, par: gemm::Parallelism) {
    unsafe { gemm::gemm(m, n, k, c, 1, cr as isize, false, a, ac as isize, ar as isize, b, bc as isize, br as isize, 1.0f32, 1.0, false, false, false, par) }
}
fn main() {
    // linear fwd, dX, dW for (tokens,in,out)
    for (t, i, o) in [(1024, 288, 288), (1024, 288, 768), (1024, 768, 288), (1024, 256, 640), (1024, 288, 32000), (256, 288, 32000), (128, 288, 32000)] {
        let x = vec![0.01f32; t * i]; let w = vec![0.02f32; o * i]; let dy = vec![0.01f32; t * o];
        for (name, m, n, k, a, sa, b, sb) in [
            ("fwd", t, o, i, &x, (i, 1), &w, (1, i)),
            ("dx ", t, i, o, &dy, (o, 1), &w, (i, 1)),
            ("dw ", o, i, t, &dy, (1, o), &x, (i, 1)),
        ] {
            let mut c = vec![0f32; m * n];
            let cp = P(c.as_mut_ptr());
            let (a, b) = (P(a.as_ptr() as *mut f32), P(b.as_ptr() as *mut f32));
            let mut line = format!("{t}x{i}x{o} {name}:");
            let mut run = |label: &str, f: &(dyn Fn() + Sync)| {
                f();
                let mut best = f64::MAX;
                for _ in 0..9 { let s = Instant::now(); f(); best = best.min(s.elapsed().as_secs_f64()); }
                line += &format!(" {label} {:.0}", 2.0 * (m * n * k) as f64 / best / 1e9);
            };
            run("rayon", &|| unsafe { g(m, n, k, cp.at(0), n, a.at(0), sa, b.at(0), sb, gemm::Parallelism::Rayon(0)) });
            for pieces in [1, 2, 4, 8] {
                let wd = n.div_ceil(pieces).next_multiple_of(if n / pieces > 96 {48} else {16});
                run(&format!("n{pieces}"), &|| (0..n.div_ceil(wd)).into_par_iter().for_each(|p| unsafe { let s = p * wd; g(m, wd.min(n - s), k, cp.at(s), n, a.at(0), sa, b.at(s * sb.1), sb, gemm::Parallelism::None) }));
                let ht = m.div_ceil(pieces).next_multiple_of(8);
                run(&format!("m{pieces}"), &|| (0..m.div_ceil(ht)).into_par_iter().for_each(|p| unsafe { let s = p * ht; g(ht.min(m - s), n, k, cp.at(s * n), n, a.at(s * sa.0), sa, b.at(0), sb, gemm::Parallelism::None) }));
            }
            println!("{line}");
        }
    }
}
