//! Element types of stored tensors: all of the safetensors format, and the block types of GGML.
//! Sizes are exact (some types pack several elements into a byte); decoding lives in `convert`
//! and `gguf`.

use std::fmt;

/// Element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE double.
    F64,
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities (OCP E4M3).
    F8E4M3,
    /// 8-bit float, 5 exponent and 2 mantissa bits, IEEE-like (OCP E5M2).
    F8E5M2,
    /// E4M3 with bias 8, without negative zero; 0x80 is NaN.
    F8E4M3Fnuz,
    /// E5M2 with bias 16, without negative zero; 0x80 is NaN.
    F8E5M2Fnuz,
    /// 8-bit power of two (OCP E8M0), used for block scales.
    F8E8M0,
    /// 4-bit float E2M1, two per byte, low nibble first.
    F4,
    /// 6-bit float E2M3, four in three bytes.
    F6E2M3,
    /// 6-bit float E3M2, four in three bytes.
    F6E3M2,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Signed 16-bit integer.
    I16,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 64-bit integer.
    U64,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 8-bit integer.
    U8,
    /// One byte per truth value.
    Bool,
    /// Complex number of two IEEE singles.
    C64,
    /// A block type of GGML (from GGUF files).
    Ggml(GgmlType),
}

const NAMES: [(Dtype, &str, u32); 22] = [
    (Dtype::F64, "F64", 64),
    (Dtype::F32, "F32", 32),
    (Dtype::F16, "F16", 16),
    (Dtype::BF16, "BF16", 16),
    (Dtype::F8E4M3, "F8_E4M3", 8),
    (Dtype::F8E5M2, "F8_E5M2", 8),
    (Dtype::F8E4M3Fnuz, "F8_E4M3FNUZ", 8),
    (Dtype::F8E5M2Fnuz, "F8_E5M2FNUZ", 8),
    (Dtype::F8E8M0, "F8_E8M0", 8),
    (Dtype::F4, "F4", 4),
    (Dtype::F6E2M3, "F6_E2M3", 6),
    (Dtype::F6E3M2, "F6_E3M2", 6),
    (Dtype::I64, "I64", 64),
    (Dtype::I32, "I32", 32),
    (Dtype::I16, "I16", 16),
    (Dtype::I8, "I8", 8),
    (Dtype::U64, "U64", 64),
    (Dtype::U32, "U32", 32),
    (Dtype::U16, "U16", 16),
    (Dtype::U8, "U8", 8),
    (Dtype::Bool, "BOOL", 8),
    (Dtype::C64, "C64", 64),
];

impl Dtype {
    /// Bits per element. Fractional for the block types of GGML (Q4_0: 4.5).
    pub fn bits(self) -> f64 {
        match self {
            Self::Ggml(kind) => kind.block_bytes() as f64 * 8.0 / kind.block_size() as f64,
            plain => f64::from(plain.whole_bits()),
        }
    }

    /// Bits per element of a type that is not a GGML block type; 0 for those.
    fn whole_bits(self) -> u32 {
        NAMES.iter().find(|(dtype, _, _)| *dtype == self).map_or(0, |(_, _, bits)| *bits)
    }

    /// Name in the safetensors format ("F16", "F8_E4M3"), or GGML's name ("Q4_K").
    pub fn name(self) -> &'static str {
        match self {
            Self::Ggml(kind) => kind.name(),
            plain => {
                NAMES.iter().find(|(dtype, _, _)| *dtype == plain).map_or("?", |(_, name, _)| name)
            }
        }
    }

    /// The safetensors dtype of that exact name.
    pub fn parse(name: &str) -> Option<Self> {
        NAMES.iter().find(|(_, known, _)| *known == name).map(|(dtype, _, _)| *dtype)
    }

    /// All names of the safetensors format, for messages.
    pub fn known_names() -> String {
        NAMES.map(|(_, name, _)| name).join(", ")
    }

    /// Bytes that `elements` elements take; `None` if they do not fill whole bytes (or blocks), or
    /// if the number overflows.
    pub fn bytes_for(self, elements: u64) -> Option<u64> {
        if let Self::Ggml(kind) = self {
            let (per_block, bytes) = (kind.block_size() as u64, kind.block_bytes() as u64);
            return if elements.is_multiple_of(per_block) {
                (elements / per_block).checked_mul(bytes)
            } else {
                None
            };
        }
        let bits = elements.checked_mul(u64::from(self.whole_bits()))?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Alignment in bytes that a reader may expect of the data (1 for packed and block types).
    pub fn alignment(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 | Self::C64 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            _ => 1,
        }
    }

    /// Whether the type stores real numbers (floats or GGML blocks of them).
    pub fn is_float(self) -> bool {
        !matches!(
            self,
            Self::I64
                | Self::I32
                | Self::I16
                | Self::I8
                | Self::U64
                | Self::U32
                | Self::U16
                | Self::U8
                | Self::Bool
                | Self::C64
        )
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

macro_rules! ggml_types {
    ($($variant:ident = $id:literal, $elements:literal, $bytes:literal;)*) => {
        /// Element formats of GGML. Quantised ones come in blocks of consecutive elements of a
        /// row. All can be listed and sized; `gguf` decodes the common ones.
        #[allow(non_camel_case_types)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum GgmlType {
            $(
                #[doc = concat!(
                    "GGML ", stringify!($variant), ": ", $elements, " element(s) in ", $bytes,
                    " byte(s)."
                )]
                $variant,
            )*
        }

        impl GgmlType {
            /// The type with that number in a GGUF file.
            pub fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)* _ => None }
            }

            /// The number of the type in a GGUF file.
            pub fn id(self) -> u32 {
                match self { $(Self::$variant => $id,)* }
            }

            /// GGML's name of the type.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }

            /// Elements of one block.
            pub fn block_size(self) -> usize {
                match self { $(Self::$variant => $elements,)* }
            }

            /// Bytes of one block.
            pub fn block_bytes(self) -> usize {
                match self { $(Self::$variant => $bytes,)* }
            }
        }
    };
}

ggml_types! {
    F32 = 0, 1, 4;
    F16 = 1, 1, 2;
    Q4_0 = 2, 32, 18;
    Q4_1 = 3, 32, 20;
    Q5_0 = 6, 32, 22;
    Q5_1 = 7, 32, 24;
    Q8_0 = 8, 32, 34;
    Q8_1 = 9, 32, 40;
    Q2_K = 10, 256, 84;
    Q3_K = 11, 256, 110;
    Q4_K = 12, 256, 144;
    Q5_K = 13, 256, 176;
    Q6_K = 14, 256, 210;
    Q8_K = 15, 256, 292;
    IQ2_XXS = 16, 256, 66;
    IQ2_XS = 17, 256, 74;
    IQ3_XXS = 18, 256, 98;
    IQ1_S = 19, 256, 50;
    IQ4_NL = 20, 32, 18;
    IQ3_S = 21, 256, 110;
    IQ2_S = 22, 256, 82;
    IQ4_XS = 23, 256, 136;
    I8 = 24, 1, 1;
    I16 = 25, 1, 2;
    I32 = 26, 1, 4;
    I64 = 27, 1, 8;
    F64 = 28, 1, 8;
    IQ1_M = 29, 256, 56;
    BF16 = 30, 1, 2;
    TQ1_0 = 34, 256, 54;
    TQ2_0 = 35, 256, 66;
    MXFP4 = 39, 32, 17;
    NVFP4 = 40, 64, 36;
    Q1_0 = 41, 128, 18;
}

impl GgmlType {
    /// Bytes that `elements` elements take; `None` when they are no whole number of blocks or the
    /// number overflows.
    pub fn bytes_for(self, elements: usize) -> Option<usize> {
        if elements.is_multiple_of(self.block_size()) {
            (elements / self.block_size()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes() {
        for (dtype, name, _) in NAMES {
            assert_eq!(Dtype::parse(name), Some(dtype));
            assert_eq!(dtype.name(), name);
        }
        assert_eq!(Dtype::parse("f16"), None);
        assert_eq!(Dtype::F4.bytes_for(6), Some(3));
        assert_eq!(Dtype::F4.bytes_for(5), None);
        assert_eq!(Dtype::F6E2M3.bytes_for(4), Some(3));
        assert_eq!(Dtype::F64.bytes_for(u64::MAX / 8), None);
        assert_eq!(Dtype::Ggml(GgmlType::Q4_0).bits(), 4.5);
        assert_eq!(Dtype::Ggml(GgmlType::Q6_K).bytes_for(512), Some(420));
        assert_eq!(Dtype::Ggml(GgmlType::Q6_K).bytes_for(511), None);
    }

    #[test]
    fn ggml_ids_round_trip() {
        let known = (0..256).filter_map(|id| GgmlType::from_id(id).map(|kind| (id, kind)));
        assert_eq!(known.clone().count(), 34);
        assert!(known.clone().all(|(id, kind)| kind.id() == id));
        assert_eq!(GgmlType::from_id(12), Some(GgmlType::Q4_K));
        assert_eq!(GgmlType::Q4_K.name(), "Q4_K");
        assert_eq!(GgmlType::Q4_K.bytes_for(512), Some(288));
    }
}
