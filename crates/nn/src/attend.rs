//! The attention stage: projections, q/k norms, rotation, cache, attention.

use tensor::{Tensor, host, ops};

use crate::config::{Positions, Qkv};
use crate::{Context, Decoder, Error, Point, Result, Site, Taps, Weights};

impl Decoder {
    /// From the input of q, k, v of block `i` to the input of its output projection.
    pub(crate) fn attend(
        &self,
        i: usize,
        w: &dyn Weights,
        x: Tensor<2>,
        ctx: &mut Context<'_>,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        let batch = ctx.batch;
        let site = |point| Site::block(i, point);
        let [q, k, v] = self.project_qkv(i, w, x)?;
        let q = taps.at(site(Point::Q), &batch, q)?;
        let k = taps.at(site(Point::K), &batch, k)?;
        let v = taps.at(site(Point::V), &batch, v)?;
        let [mut q, mut k] = self.place_heads(i, w, [q, k], ctx)?;
        if let Positions::Rotary { .. } = self.config.positions {
            q = taps.at(site(Point::RotQ), &batch, q)?;
            k = taps.at(site(Point::RotK), &batch, k)?;
        }
        let z = self.mix(i, q, k, v, ctx, taps)?;
        taps.at(site(Point::Z), &batch, z)
    }

    /// Norms and rotation of query and key heads.
    fn place_heads(
        &self,
        i: usize,
        w: &dyn Weights,
        [mut q, mut k]: [Tensor<2>; 2],
        ctx: &Context<'_>,
    ) -> Result<[Tensor<2>; 2]> {
        if let Some([query_norm, key_norm]) = &self.names(i)?.qk_norm {
            q = self.head_norm(query_norm, w, q)?;
            k = self.head_norm(key_norm, w, k)?;
        }
        if let Positions::Rotary { .. } = self.config.positions {
            let table = self.rope_table(ctx.start + ctx.batch.length)?;
            q = ops::rope(q, &table, &ctx.positions, self.config.head_dim);
            k = ops::rope(k, &table, &ctx.positions, self.config.head_dim);
        }
        Ok([q, k])
    }

    /// Queries and keys of block `i` as they meet in the scores (after norms and rotation), from
    /// the input of q, k, v.
    ///
    /// # Errors
    /// From the weights, or more positions than the network has.
    pub fn queries_and_keys(
        &self,
        i: usize,
        w: &dyn Weights,
        x: Tensor<2>,
        ctx: &Context<'_>,
    ) -> Result<[Tensor<2>; 2]> {
        let heads = match (self.config.qkv, self.names(i)?.qkv.as_slice()) {
            (Qkv::Separate, [query, key, _]) => [w.linear(query, x.clone())?, w.linear(key, x)?],
            _ => {
                let [q, k, _] = self.project_qkv(i, w, x)?;
                [q, k]
            }
        };
        self.place_heads(i, w, heads, ctx)
    }

    fn head_norm(&self, name: &crate::Name, w: &dyn Weights, x: Tensor<2>) -> Result<Tensor<2>> {
        let [rows, width] = x.dims();
        let dim = self.config.head_dim;
        let x = x.reshape([rows * width / dim, dim]);
        Ok(self.norm(name, w, x)?.reshape([rows, width]))
    }

    fn project_qkv(&self, i: usize, w: &dyn Weights, x: Tensor<2>) -> Result<[Tensor<2>; 3]> {
        let names = self.names(i)?;
        let c = &self.config;
        match (c.qkv, names.qkv.as_slice()) {
            (Qkv::Separate, [query, key, value]) => {
                Ok([w.linear(query, x.clone())?, w.linear(key, x.clone())?, w.linear(value, x)?])
            }
            (Qkv::Fused, [all]) => {
                let y = w.linear(all, x)?;
                let (q, kv) = (c.query_width(), c.key_width());
                Ok([y.clone().narrow(1, 0, q), y.clone().narrow(1, q, kv), y.narrow(1, q + kv, kv)])
            }
            (Qkv::FusedPerHead, [all]) => {
                let y = w.linear(all, x)?;
                let (rows, heads, dim) = (y.dims()[0], c.num_attention_heads, c.head_dim);
                let y = y.reshape([rows, heads, 3 * dim]);
                let part =
                    |j: usize| y.clone().narrow(2, j * dim, dim).reshape([rows, heads * dim]);
                Ok([part(0), part(1), part(2)])
            }
            _ => Err(Error::Weights {
                name: names.output.module.clone(),
                reason: "the names of its projections do not fit the config".into(),
            }),
        }
    }

    /// The geometry of block `i`'s attention for `queries` rows after `offset` earlier positions.
    pub fn attention_spec(
        &self,
        i: usize,
        batch: &crate::Batch,
        offset: usize,
    ) -> ops::AttentionSpec {
        let c = &self.config;
        let scale = match c.scale_by_layer {
            true => c.attention_scale / (i + 1) as f32,
            false => c.attention_scale,
        };
        ops::AttentionSpec {
            batch: batch.sequences,
            queries: batch.length,
            keys: offset + batch.length,
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            head_dim: c.head_dim,
            scale,
            causal: true,
            offset,
            window: c.windows.get(i).copied().flatten(),
            softcap: c.attention_softcap,
        }
    }

    fn mix(
        &self,
        i: usize,
        q: Tensor<2>,
        k: Tensor<2>,
        v: Tensor<2>,
        ctx: &mut Context<'_>,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor<2>> {
        let batch = ctx.batch;
        let (scores, pattern) = (Site::block(i, Point::AttnScores), Site::block(i, Point::Pattern));
        let watched = taps.wants(scores) || taps.wants(pattern);
        let (mut k, mut v) = (k, v);
        let mut offset = 0;
        if let Some(cache) = ctx.cache.as_deref_mut() {
            if batch.sequences != 1 {
                return Err(Error::Input("a cache serves one sequence at a time".into()));
            }
            let layer = cache.layer(i)?;
            if layer.len() != ctx.start {
                return Err(Error::Input(format!(
                    "block {i}: the cache holds {} positions, the pass starts at {}",
                    layer.len(),
                    ctx.start
                )));
            }
            host::read(&k, |k| host::read(&v, |v| layer.append(k, v)))?;
            offset = ctx.start;
            let spec = self.attention_spec(i, &batch, offset);
            if batch.length == 1 && !watched {
                let device = q.device();
                let z = host::read(&q, |q| layer.attend(q, &spec));
                let width = z.len();
                return Ok(host::from_vec(z, [1, width], &device));
            }
            if offset > 0 {
                (k, v) = layer.tensors(&q.device());
            }
        }
        let spec = self.attention_spec(i, &batch, offset);
        if !watched {
            return Ok(ops::attention(q, k, v, &spec));
        }
        let s = taps.at(scores, &batch, ops::attention_scores(q, k, &spec))?;
        let p = taps.at(pattern, &batch, ops::attention_pattern(s))?;
        Ok(ops::attention_mix(p, v, &spec))
    }
}
