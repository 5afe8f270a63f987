//! A decoder in f64, one sequence, by definition: slow loops and no shortcuts. It knows the
//! families whose blocks add to the residual stream directly.

use strata_nn as nn;

use nn::config::{NormKind, Placement, Positions, Qkv};
use nn::{Decoder, Leaf, Name};
use tensor::ops::Activation;

/// Weights in double precision.
pub trait Double {
    fn matrix(&self, name: &Name) -> Vec<f64>;
    fn vector(&self, name: &Name, leaf: Leaf) -> Vec<f64>;
}

type Rows = Vec<Vec<f64>>;

fn linear(w: &dyn Double, name: &Name, x: &Rows) -> Rows {
    let [out, width] = name.shape;
    let matrix = w.matrix(name);
    let bias = if name.bias { w.vector(name, Leaf::Bias) } else { vec![0.0; out] };
    let row = |x: &Vec<f64>| -> Vec<f64> {
        (0..out)
            .map(|o| {
                let row = &matrix[o * width..(o + 1) * width];
                bias[o] + row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()
            })
            .collect()
    };
    x.iter().map(row).collect()
}

fn norm(d: &Decoder, w: &dyn Double, name: &Name, x: &Rows, rms: bool) -> Rows {
    let mut gain = w.vector(name, Leaf::Weight);
    if name.plus_one {
        gain.iter_mut().for_each(|g| *g += 1.0);
    }
    let bias = if name.bias { w.vector(name, Leaf::Bias) } else { vec![0.0; gain.len()] };
    let row = |x: &Vec<f64>| -> Vec<f64> {
        let n = x.len() as f64;
        let mean = if rms { 0.0 } else { x.iter().sum::<f64>() / n };
        let power = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        let scale = 1.0 / (power + f64::from(d.config.norm_eps)).sqrt();
        x.iter().zip(&gain).zip(&bias).map(|((v, g), b)| (v - mean) * scale * g + b).collect()
    };
    x.iter().map(row).collect()
}

fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

/// Logits `[tokens * vocab]` of one sequence.
pub fn logits_f64(d: &Decoder, w: &dyn Double, ids: &[u32]) -> Vec<f64> {
    let c = &d.config;
    let rms = c.norm != NormKind::Layer;
    let row = |table: &[f64], width: usize, id: usize| table[id * width..(id + 1) * width].to_vec();
    let table = w.matrix(&d.embed);
    let mut x: Rows = ids.iter().map(|&id| row(&table, c.embed_size, id as usize)).collect();
    if let Some(project) = &d.project_in {
        x = linear(w, project, &x);
    }
    if let (Some(position), Positions::Learned { offset }) = (&d.position, c.positions) {
        let table = w.matrix(position);
        let rows = (0..ids.len()).map(|t| row(&table, c.hidden_size, t + offset)).collect();
        add(&mut x, &rows);
    }
    for (i, b) in d.blocks.iter().enumerate() {
        let a = norm(d, w, &b.norm1, &x, rms);
        let attended = linear(w, &b.output, &attend(d, w, i, &a));
        let before = x.clone();
        add(&mut x, &attended);
        let from = if c.placement == Placement::Parallel { &before } else { &x };
        let m = norm(d, w, &b.norm2, from, rms);
        let mut inner = linear(w, b.gate.as_ref().unwrap_or(&b.up), &m);
        inner.iter_mut().flatten().for_each(|v| *v = activate(c.activation, *v));
        if b.gate.is_some() {
            for (g, u) in inner.iter_mut().zip(linear(w, &b.up, &m)) {
                g.iter_mut().zip(u).for_each(|(g, u)| *g *= u);
            }
        }
        add(&mut x, &linear(w, &b.down, &inner));
    }
    if let Some(name) = &d.final_norm {
        x = norm(d, w, name, &x, rms);
    }
    if let Some(project) = &d.project_out {
        x = linear(w, project, &x);
    }
    linear(w, &d.head, &x).into_iter().flatten().collect()
}

fn activate(kind: Activation, v: f64) -> f64 {
    match kind {
        Activation::Silu => v / (1.0 + (-v).exp()),
        Activation::Relu => v.max(0.0),
        // The exact GELU needs an error function: a series that converges for the small inputs here.
        Activation::Gelu => {
            let z = v / std::f64::consts::SQRT_2;
            let mut term = z;
            let mut sum = z;
            for n in 1..200 {
                term *= -z * z / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            0.5 * v * (1.0 + 2.0 / std::f64::consts::PI.sqrt() * sum)
        }
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3));
            0.5 * v * (1.0 + inner.tanh())
        }
    }
}

/// Attention of block `i` before its output projection.
fn attend(d: &Decoder, w: &dyn Double, i: usize, x: &Rows) -> Rows {
    let (c, b) = (&d.config, &d.blocks[i]);
    let (heads, dim) = (c.num_attention_heads, c.head_dim);
    let [mut q, mut k, v]: [Rows; 3] = match c.qkv {
        Qkv::Separate => [0, 1, 2].map(|n| linear(w, &b.qkv[n], x)),
        Qkv::Fused => {
            let y = linear(w, &b.qkv[0], x);
            let (q, kv) = (c.query_width(), c.key_width());
            [0..q, q..q + kv, q + kv..q + 2 * kv]
                .map(|part| y.iter().map(|y| y[part.clone()].to_vec()).collect())
        }
        Qkv::FusedPerHead => {
            let y = linear(w, &b.qkv[0], x);
            [0, 1, 2].map(|n| {
                let pick = |y: &Vec<f64>| {
                    (0..heads)
                        .flat_map(|h| y[(3 * h + n) * dim..(3 * h + n + 1) * dim].to_vec())
                        .collect()
                };
                y.iter().map(pick).collect()
            })
        }
    };
    if let Some([query_norm, key_norm]) = &b.qk_norm {
        for (rows, name) in [(&mut q, query_norm), (&mut k, key_norm)] {
            for row in rows.iter_mut() {
                let parts: Rows = row.chunks(dim).map(<[f64]>::to_vec).collect();
                *row = norm(d, w, name, &parts, true).into_iter().flatten().collect();
            }
        }
    }
    if let Positions::Rotary { theta, dim: turned, .. } = c.positions {
        for row in [&mut q, &mut k] {
            for (t, row) in row.iter_mut().enumerate() {
                for head in row.chunks_mut(dim) {
                    for j in 0..turned / 2 {
                        let angle = t as f64 * theta.powf(-2.0 * j as f64 / turned as f64);
                        let (a, b) = (head[j], head[j + turned / 2]);
                        head[j] = a * angle.cos() - b * angle.sin();
                        head[j + turned / 2] = b * angle.cos() + a * angle.sin();
                    }
                }
            }
        }
    }
    let repeat = heads / c.num_key_value_heads;
    let mut out = vec![vec![0.0; heads * dim]; x.len()];
    for (t, out) in out.iter_mut().enumerate() {
        let first = c.windows[i].map_or(0, |window| (t + 1).saturating_sub(window));
        for h in 0..heads {
            let at = (h / repeat) * dim;
            let query = &q[t][h * dim..(h + 1) * dim];
            let scores: Vec<f64> = (first..=t)
                .map(|s| {
                    let dot: f64 = query.iter().zip(&k[s][at..at + dim]).map(|(a, b)| a * b).sum();
                    (dot * f64::from(c.attention_scale)).exp()
                })
                .collect();
            let total: f64 = scores.iter().sum();
            for (s, score) in (first..=t).zip(&scores) {
                for j in 0..dim {
                    out[h * dim + j] += score / total * v[s][at + j];
                }
            }
        }
    }
    out
}
