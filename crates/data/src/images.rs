//! Labelled images from the files that the classical data sets come in.
//!
//! Known are CIFAR-10's binary records (one label byte, then 32 x 32 red, green and blue) and IDX
//! (MNIST and its relatives: images in one file, labels in another), both also gzipped. What a file
//! is shows in its bytes; its name only says where the labels of an IDX file lie.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use crate::{Error, Result};

/// Largest file, packed or unpacked, that is read; real ones have at most 170 MiB.
const MAX_BYTES: u64 = 1 << 30;
/// One record of CIFAR-10: label, red, green, blue.
const CIFAR_RECORD: usize = 1 + 3 * 32 * 32;
const CIFAR_CLASSES: u8 = 10;
/// IDX: two zero bytes, type 8 (unsigned byte), number of dimensions.
const IDX_IMAGES: [u8; 4] = [0, 0, 8, 3];
const IDX_LABELS: [u8; 4] = [0, 0, 8, 1];

/// Images of one size with their labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Images {
    /// `[channels, height, width]` of every image.
    pub shape: [usize; 3],
    /// Values 0 to 255, image by image, channel by channel.
    pub pixels: Vec<u8>,
    /// The class of every image.
    pub labels: Vec<u32>,
}

impl Images {
    /// Reads labelled images. `labels` is the file of labels of an IDX file of images; without it
    /// the usual name is looked for (`...images-idx3...` becomes `...labels-idx1...`).
    ///
    /// # Errors
    /// A file that cannot be read or unpacked, is of no known kind, is cut off, or whose labels do
    /// not fit; each by name.
    pub fn load(path: &Path, labels: Option<&Path>) -> Result<Self> {
        let bytes = read(path)?;
        if bytes.starts_with(&IDX_LABELS) && idx_count(&bytes, 8) {
            let what = "holds IDX labels; give the file of images";
            return Err(Error::file(path, what));
        }
        if bytes.starts_with(&IDX_IMAGES) && !is_cifar(&bytes) {
            return Self::idx(path, &bytes, labels);
        }
        if labels.is_some() {
            let what = "carries its labels itself; only IDX files have them in another file";
            return Err(Error::file(path, what));
        }
        Self::cifar(path, &bytes)
    }

    fn cifar(path: &Path, bytes: &[u8]) -> Result<Self> {
        let (records, rest) = bytes.as_chunks::<CIFAR_RECORD>();
        if records.is_empty() || !rest.is_empty() {
            return Err(Error::file(
                path,
                format!(
                    "{} bytes are neither IDX images nor whole CIFAR-10 records of {CIFAR_RECORD} \
                     bytes ({} bytes are left over)",
                    bytes.len(),
                    rest.len()
                ),
            ));
        }
        let mut pixels = Vec::with_capacity(records.len() * (CIFAR_RECORD - 1));
        let mut labels = Vec::with_capacity(records.len());
        for (at, [label, values @ ..]) in records.iter().enumerate() {
            if *label >= CIFAR_CLASSES {
                return Err(Error::file(
                    path,
                    format!("record {at} has label {label}; CIFAR-10 has labels 0 to 9"),
                ));
            }
            labels.push(u32::from(*label));
            pixels.extend_from_slice(values);
        }
        Ok(Images { shape: [3, 32, 32], pixels, labels })
    }

    fn idx(path: &Path, bytes: &[u8], labels: Option<&Path>) -> Result<Self> {
        let [count, height, width] = idx_sizes::<3>(path, bytes)?;
        let pixels = idx_values(path, bytes, 16, &[count, height, width])?.to_vec();
        if pixels.is_empty() {
            return Err(Error::file(path, format!("holds {count} images of {height} x {width}")));
        }
        let beside = match labels {
            Some(labels) => labels.to_path_buf(),
            None => labels_beside(path).ok_or_else(|| {
                Error::file(path, "holds IDX images; name the file of their labels as well")
            })?,
        };
        let labels = read(&beside)?;
        if !labels.starts_with(&IDX_LABELS) {
            return Err(Error::file(&beside, "does not hold IDX labels (unsigned bytes)"));
        }
        let [labelled] = idx_sizes::<1>(&beside, &labels)?;
        let values = idx_values(&beside, &labels, 8, &[labelled])?;
        if labelled != count {
            let what = format!("{labelled} labels for the {count} images of {}", path.display());
            return Err(Error::file(&beside, what));
        }
        let labels = values.iter().map(|&v| u32::from(v)).collect();
        Ok(Images { shape: [1, height, width], pixels, labels })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Values of one image.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Keeps the first `count` images.
    pub fn truncate(&mut self, count: usize) {
        self.labels.truncate(count);
        self.pixels.truncate(self.labels.len() * self.values());
    }

    /// The images at `indices` with values in 0..=1, less `mean`, divided by `deviation` (one number
    /// per channel): `[indices, channels, height, width]`.
    ///
    /// # Errors
    /// An index that is not there, or not one number per channel.
    pub fn normalised(
        &self,
        indices: &[usize],
        mean: &[f32],
        deviation: &[f32],
    ) -> Result<Vec<f32>> {
        let [channels, height, width] = self.shape;
        if mean.len() != channels || deviation.len() != channels {
            return Err(Error::Argument(format!(
                "{} means and {} deviations for images of {channels} channels",
                mean.len(),
                deviation.len()
            )));
        }
        let (values, plane) = (self.values(), height * width);
        let mut all = Vec::with_capacity(indices.len() * values);
        for &index in indices {
            let start = index.saturating_mul(values);
            let image = self.pixels.get(start..start.saturating_add(values)).ok_or_else(|| {
                Error::Argument(format!("image {index} of {} is asked for", self.len()))
            })?;
            for ((plane, mean), deviation) in image.chunks_exact(plane).zip(mean).zip(deviation) {
                all.extend(plane.iter().map(|&v| (f32::from(v) / 255.0 - mean) / deviation));
            }
        }
        Ok(all)
    }

    /// `count` indices spread evenly over the images (every one if there are no more): the sample
    /// that a calibration takes.
    pub fn spread(&self, count: usize) -> Vec<usize> {
        let step = (self.len() / count.max(1)).max(1);
        (0..self.len()).step_by(step).take(count).collect()
    }
}

/// Whole records whose labels are all possible: a file may begin like IDX by chance.
fn is_cifar(bytes: &[u8]) -> bool {
    let (records, rest) = bytes.as_chunks::<CIFAR_RECORD>();
    rest.is_empty()
        && !records.is_empty()
        && records.iter().all(|record| record[0] < CIFAR_CLASSES)
        && idx_sizes::<3>(Path::new(""), bytes).map_or(true, |sizes| {
            let count = sizes.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
            count.and_then(|n| n.checked_add(16)) != Some(bytes.len())
        })
}

fn idx_count(bytes: &[u8], header: usize) -> bool {
    let count = bytes.get(4..8).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(u32::from_be_bytes);
    count.is_some_and(|n| n as usize + header == bytes.len())
}

/// The big-endian sizes behind the magic number.
fn idx_sizes<const N: usize>(path: &Path, bytes: &[u8]) -> Result<[usize; N]> {
    let mut sizes = [0; N];
    for (size, bytes) in sizes.iter_mut().zip(bytes.get(4..).unwrap_or_default().chunks(4)) {
        let bytes = <[u8; 4]>::try_from(bytes);
        *size = match bytes {
            Ok(bytes) => u32::from_be_bytes(bytes) as usize,
            Err(_) => return Err(Error::file(path, "ends inside its IDX header")),
        };
    }
    if bytes.len() < 4 + 4 * N {
        return Err(Error::file(path, "ends inside its IDX header"));
    }
    Ok(sizes)
}

fn idx_values<'a>(
    path: &Path,
    bytes: &'a [u8],
    header: usize,
    sizes: &[usize],
) -> Result<&'a [u8]> {
    let count = sizes.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
    let values = bytes.get(header..).unwrap_or_default();
    if count != Some(values.len()) {
        let what = format!("its header says {sizes:?} values, but {} follow", values.len());
        return Err(Error::file(path, what));
    }
    Ok(values)
}

/// Where the labels of an IDX file of images usually lie.
fn labels_beside(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let labels = name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1");
    (labels != name).then(|| path.with_file_name(labels))
}

/// The bytes of a file, unpacked if it is gzipped; at most [`MAX_BYTES`] of them.
fn read(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    let too_large = || Error::file(path, format!("holds more than {MAX_BYTES} bytes"));
    if bytes.len() as u64 > MAX_BYTES {
        return Err(too_large());
    }
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    let mut unpacked = Vec::new();
    MultiGzDecoder::new(bytes.as_slice()).take(MAX_BYTES + 1).read_to_end(&mut unpacked).map_err(
        |error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::file(path, "the gzip stream is cut off; fetch or pack the file again")
            }
            _ => Error::file(path, format!("is not a whole gzip file: {error}")),
        },
    )?;
    if unpacked.len() as u64 > MAX_BYTES { Err(too_large()) } else { Ok(unpacked) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    fn gzipped(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn cifar(labels: &[u8]) -> Vec<u8> {
        let pixels = |label: u8| (0..3072).map(move |i| (i / 1024) as u8 * 50 + label);
        labels.iter().flat_map(|&label| std::iter::once(label).chain(pixels(label))).collect()
    }

    fn idx(magic: [u8; 4], sizes: &[u32], values: &[u8]) -> Vec<u8> {
        let mut bytes = magic.to_vec();
        sizes.iter().for_each(|n| bytes.extend(n.to_be_bytes()));
        bytes.extend(values);
        bytes
    }

    fn refused(path: &Path, labels: Option<&Path>) -> String {
        Images::load(path, labels).unwrap_err().to_string()
    }

    #[test]
    fn cifar_records_plain_and_gzipped() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = cifar(&[3, 0, 9]);
        let (plain, packed) = (dir.path().join("a.bin"), dir.path().join("a.bin.gz"));
        std::fs::write(&plain, &bytes).unwrap();
        std::fs::write(&packed, gzipped(&bytes)).unwrap();
        let mut images = Images::load(&plain, None).unwrap();
        assert_eq!(images, Images::load(&packed, None).unwrap());
        assert_eq!((images.shape, &images.labels[..]), ([3, 32, 32], &[3, 0, 9][..]));
        let values = images.normalised(&[2], &[0.0, 0.0, 0.5], &[1.0, 1.0, 0.1]).unwrap();
        assert!((values[0] - 9.0 / 255.0).abs() < 1e-6);
        assert!((values[3071] - (109.0 / 255.0 - 0.5) / 0.1).abs() < 1e-5);
        assert!(images.normalised(&[3], &[0.0; 3], &[1.0; 3]).is_err());
        assert!(images.normalised(&[0], &[0.0], &[1.0]).is_err());
        assert_eq!(images.spread(2), [0, 1]);
        assert_eq!(images.spread(9), [0, 1, 2]);
        images.truncate(1);
        assert_eq!((images.len(), images.pixels.len()), (1, 3072));
    }

    #[test]
    fn idx_images_find_their_labels() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t10k-images-idx3-ubyte.gz");
        let beside = dir.path().join("t10k-labels-idx1-ubyte.gz");
        let images = idx(IDX_IMAGES, &[2, 2, 3], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255]);
        std::fs::write(&path, gzipped(&images)).unwrap();
        assert!(refused(&path, None).contains("t10k-labels-idx1-ubyte.gz"));
        std::fs::write(&beside, gzipped(&idx(IDX_LABELS, &[2], &[7, 1]))).unwrap();
        let images = Images::load(&path, None).unwrap();
        assert_eq!((images.shape, &images.labels[..]), ([1, 2, 3], &[7, 1][..]));
        assert_eq!(images.pixels[6..], [6, 7, 8, 9, 10, 255]);
        assert_eq!(Images::load(&path, Some(&beside)).unwrap(), images);
        assert!(refused(&beside, None).contains("give the file of images"));
        assert!(refused(&path, Some(&path)).contains("does not hold IDX labels"));
        std::fs::write(&beside, idx(IDX_LABELS, &[3], &[7, 1, 1])).unwrap();
        assert!(refused(&path, None).contains("3 labels for the 2 images"));
        let other = dir.path().join("pictures");
        std::fs::copy(&path, &other).unwrap();
        assert!(refused(&other, None).contains("name the file of their labels"));
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.bin.gz");
        let refusal = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let message = refused(&path, None);
            assert!(message.contains("data.bin.gz"), "{message}");
            message
        };
        let whole = gzipped(&cifar(&[1, 2]));
        assert!(refusal(&whole[..whole.len() / 2]).contains("cut off"));
        assert!(refusal(&[&whole[..], b"rest"].concat()).contains("gzip"));
        assert!(refusal(&gzipped(&cifar(&[1, 2])[..5000])).contains("1927 bytes are left over"));
        assert!(refusal(&gzipped(&cifar(&[1, 10]))).contains("record 1 has label 10"));
        assert!(refusal(b"").contains("0 bytes"));
        assert!(refusal(&idx(IDX_IMAGES, &[2, 2], &[])).contains("ends inside its IDX header"));
        let short = idx(IDX_IMAGES, &[u32::MAX, u32::MAX, u32::MAX], &[1, 2]);
        assert!(refusal(&short).contains("but 2 follow"));
        assert!(refusal(&idx(IDX_IMAGES, &[0, 28, 28], &[])).contains("0 images"));
        assert!(refused(&dir.path().join("nowhere"), None).contains("nowhere"));
    }

    #[test]
    fn a_bomb_is_bounded() {
        // 1 GiB and a bit of zeros, packed to about 1 MiB (in pieces, so that the test is quick).
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bomb.gz");
        let piece = gzipped(&vec![0; 16 << 20]);
        let mut file = File::create(&path).unwrap();
        for _ in 0..65 {
            file.write_all(&piece).unwrap();
        }
        drop(file);
        assert!(refused(&path, None).contains("more than 1073741824 bytes"));
    }
}
