//! Bytes of a strided view, copied into contiguous little-endian order.

use super::archive::Place;

/// A tensor whose bytes have been located.
#[derive(Debug, Clone)]
pub(super) struct Located {
    /// The whole storage.
    pub place: Place,
    /// Bytes of one element.
    pub width: usize,
    /// First element, from the start of the storage.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<usize>,
    /// Whether the elements are big-endian.
    pub swap: bool,
}

impl Located {
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements that lie one after the other at the end of every index.
    fn run(&self) -> (usize, usize) {
        let mut run = 1;
        let mut outer = self.shape.len();
        for (axis, (&size, &stride)) in self.shape.iter().zip(&self.strides).enumerate().rev() {
            if size != 1 && stride != run {
                break;
            }
            run *= size;
            outer = axis;
        }
        (run, outer)
    }

    /// The bytes of a stored (not deflated) storage; empty if they should lie outside `file`.
    pub(super) fn slice<'f>(&self, file: &'f [u8]) -> &'f [u8] {
        file.get(self.place.start..self.place.start + self.place.len).unwrap_or_default()
    }

    /// The range of the file that holds exactly this tensor, if its bytes need no change at all.
    pub(super) fn as_stored(&self) -> Option<(usize, usize)> {
        let changed = self.place.deflated || (self.swap && self.width > 1);
        (!changed && self.run().1 == 0)
            .then(|| (self.place.start + self.offset * self.width, self.elements() * self.width))
    }

    /// Copies the view out of the bytes of its storage.
    pub(super) fn gather(&self, storage: &[u8]) -> Result<Vec<u8>, String> {
        let total = self.elements();
        let mut out = Vec::with_capacity(total * self.width);
        if total == 0 {
            return Ok(out);
        }
        let (run, outer) = self.run();
        let (shape, strides) = (&self.shape[..outer], &self.strides[..outer]);
        let mut index = vec![0usize; outer];
        let mut element = self.offset;
        for _ in 0..total / run {
            let start = element * self.width;
            let bytes = storage
                .get(start..start + run * self.width)
                .ok_or("the view leaves its storage")?;
            out.extend_from_slice(bytes);
            for axis in (0..outer).rev() {
                index[axis] += 1;
                element += strides[axis];
                if index[axis] < shape[axis] {
                    break;
                }
                element -= strides[axis] * shape[axis];
                index[axis] = 0;
            }
        }
        if self.swap {
            out.chunks_exact_mut(self.width).for_each(<[u8]>::reverse);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(offset: usize, shape: &[usize], strides: &[usize]) -> Located {
        Located {
            place: Place::stored(100, 24),
            width: 1,
            offset,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            swap: false,
        }
    }

    #[test]
    fn contiguous_views_stay_in_place() {
        assert_eq!(view(2, &[2, 3], &[3, 1]).as_stored(), Some((102, 6)));
        assert_eq!(view(0, &[1, 3], &[99, 1]).as_stored(), Some((100, 3)));
        assert_eq!(view(0, &[], &[]).as_stored(), Some((100, 1)));
        assert_eq!(view(0, &[3, 2], &[1, 3]).as_stored(), None);
    }

    #[test]
    fn strided_views_are_gathered() {
        let bytes: Vec<u8> = (0..24).collect();
        let get = |v: Located| v.gather(&bytes).unwrap();
        assert_eq!(get(view(0, &[3, 2], &[1, 3])), [0, 3, 1, 4, 2, 5]); // transposed [2, 3]
        assert_eq!(get(view(1, &[2, 2], &[12, 1])), [1, 2, 13, 14]); // columns of a wider matrix
        assert_eq!(get(view(5, &[3], &[0])), [5, 5, 5]); // expanded
        assert_eq!(get(view(0, &[2, 2, 2], &[12, 2, 6])), [0, 6, 2, 8, 12, 18, 14, 20]);
        assert!(get(view(7, &[0, 4], &[4, 1])).is_empty());
        assert!(view(23, &[2], &[1]).gather(&bytes).is_err());
    }

    #[test]
    fn big_endian_elements_are_swapped() {
        let mut v = view(0, &[2], &[1]);
        (v.width, v.swap) = (2, true);
        assert_eq!(v.as_stored(), None);
        assert_eq!(v.gather(&[1, 2, 3, 4]).unwrap(), [2, 1, 4, 3]);
    }
}
