//! Cross-entropy of next tokens, from logits or fused with the output head.
use super::record::{Buffer, Call, Operand};
use super::{IGNORE, composed};
use crate::Tensor;
use crate::kernels::loss::{self, HeadLoss};

/// The mean over counted targets of `logsumexp(logits) - logits[target]`, as a tensor of one value;
/// `logits [tokens, vocab]`. Targets equal to `ignore` (usually [`IGNORE`]) are not counted; 0 if
/// none is.
///
/// # Panics
/// If there is not one target per token, or a counted target is not below `vocab`.
pub fn cross_entropy(logits: Tensor<2>, targets: &[u32], ignore: Option<u32>) -> Tensor<1> {
    let [tokens, vocab] = logits.dims();
    check("cross_entropy", tokens, vocab, targets, ignore);
    let Some(operand) = Operand::of(&logits) else {
        return composed::cross_entropy(logits, targets, ignore);
    };
    drop(logits);
    let (total, lse) = loss::forward(&operand.data, vocab, targets, ignore);
    let counted = targets.iter().filter(|&&target| Some(target) != ignore).count().max(1);
    let mean = Buffer::new(vec![(total / counted as f64) as f32], &[1]);
    let call = Call::new([&operand]);
    let kept = if operand.tracked { targets.to_vec() } else { Vec::new() };
    let logits = operand.data;
    call.finish("cross_entropy", mean, move |upstream, _| {
        // In place if nobody else holds the logits any more, which is the usual case.
        let mut dlogits = logits.into_vec();
        let factor = upstream[0] / counted as f32;
        loss::backward(&mut dlogits, vocab, &kept, ignore, &lse, factor);
        [Some(Buffer::new(dlogits, &[tokens, vocab]))]
    })
}

/// [`cross_entropy`] of `x wᵀ` (`x [tokens, width]`, `w [vocab, width]`, targets equal to
/// [`IGNORE`] not counted) without ever holding the logits of more than `chunk_tokens` tokens (0:
/// a chunk of about 64 MiB). Gradients of tracked operands are computed in the forward pass.
///
/// # Panics
/// If the shapes do not fit, there is not one target per token, or a counted target is not below
/// `vocab`.
pub fn linear_cross_entropy(
    x: Tensor<2>,
    w: Tensor<2>,
    targets: &[u32],
    chunk_tokens: usize,
) -> Tensor<1> {
    let ([tokens, width], [vocab, w_width]) = (x.dims(), w.dims());
    assert_eq!(
        width, w_width,
        "linear_cross_entropy: x [{tokens}, {width}] against w of {w_width}"
    );
    check("linear_cross_entropy", tokens, vocab, targets, Some(IGNORE));
    let (Some(x_in), Some(w_in)) = (Operand::of(&x), Operand::of(&w)) else {
        return composed::linear_cross_entropy(x, w, targets);
    };
    drop((x, w));
    let chunk = match chunk_tokens {
        0 => (DEFAULT_CHUNK_VALUES / vocab).clamp(64, 4096),
        chunk => chunk,
    };
    let wanted = [x_in.tracked, w_in.tracked];
    let HeadLoss { mean, dx, dw } =
        loss::head(&x_in.data, &w_in.data, width, targets, Some(IGNORE), chunk, wanted);
    let call = Call::new([&x_in, &w_in]);
    call.finish("linear_cross_entropy", Buffer::new(vec![mean], &[1]), move |upstream, wanted| {
        let scaled = |gradient: Option<Vec<f32>>, rows, wanted: bool| {
            let mut gradient = gradient.filter(|_| wanted)?;
            loss::scale(&mut gradient, upstream[0]);
            Some(Buffer::new(gradient, &[rows, width]))
        };
        [scaled(dx, tokens, wanted[0]), scaled(dw, vocab, wanted[1])]
    })
}

/// Logits of one chunk when the caller has no opinion.
const DEFAULT_CHUNK_VALUES: usize = 16 << 20;

fn check(what: &str, tokens: usize, vocab: usize, targets: &[u32], ignore: Option<u32>) {
    assert_eq!(targets.len(), tokens, "{what}: {} targets for {tokens} tokens", targets.len());
    let outside = |&&target: &&u32| Some(target) != ignore && target as usize >= vocab;
    let wrong = targets.iter().find(outside);
    assert!(wrong.is_none(), "{what}: target {wrong:?} in a vocabulary of {vocab}");
    assert!(vocab > 0, "{what}: an empty vocabulary");
}
