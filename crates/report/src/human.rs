//! Sizes, counts, times and shares as people write them, and sizes read back.

/// `1536` becomes `"1.50 KiB"`: three significant digits, binary units.
pub fn bytes(value: u64) -> String {
    if value < 1024 {
        return format!("{value} B");
    }
    scaled(value as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// `3_270_000` becomes `"3.27 M"`: three significant digits; below a thousand in full.
pub fn count(value: u64) -> String {
    if value < 1000 {
        return value.to_string();
    }
    scaled(value as f64, 1000.0, &["", "k", "M", "B", "T", "P", "E"])
}

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // 999.5 rounds to the four digits "1000", which the next unit writes better.
    while value >= step.min(999.5) && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {}", units.get(unit).copied().unwrap_or_default())
}

/// `123.4` becomes `"2 min 03 s"`.
pub fn seconds(value: f64) -> String {
    if !value.is_finite() {
        return "unknown".into();
    }
    if value < 0.0 {
        return format!("-{}", seconds(-value));
    }
    if value == 0.0 {
        return "0 s".into();
    }
    if value < 0.9995e-3 {
        return format!("{:.0} µs", value * 1e6);
    }
    if value < 0.9995 {
        return format!("{:.0} ms", value * 1e3);
    }
    if value < 9.995 {
        return format!("{value:.2} s");
    }
    if value < 59.95 {
        return format!("{value:.1} s");
    }
    let whole = value.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    if days > 0 {
        format!("{days} d {hours:02} h")
    } else if hours > 0 {
        format!("{hours} h {minutes:02} min")
    } else {
        format!("{minutes} min {:02} s", whole % 60)
    }
}

/// `0.1234` becomes `"12.3 %"`; shares below a percent keep two significant digits.
pub fn percent(share: f64) -> String {
    let value = share * 100.0;
    if !value.is_finite() {
        return float(value, 1);
    }
    let size = value.abs();
    if size == 0.0 {
        "0 %".into()
    } else if size >= 1.0 {
        format!("{value:.1} %")
    } else if size >= 1e-3 {
        let digits = (-size.log10().floor()) as usize + 1;
        format!("{value:.digits$} %")
    } else {
        format!("{value:.1e} %")
    }
}

/// A number with `digits` digits after the point; scientific notation where that would show
/// nothing but zeros, or more than nine digits before the point.
pub fn float(value: f64, digits: usize) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "∞".into() } else { "-∞".into() };
    }
    let size = value.abs();
    let smallest = 0.5 * 10f64.powi(-(digits.min(300) as i32));
    if (size != 0.0 && size < smallest) || size >= 1e9 {
        return format!("{value:.*e}", digits.clamp(1, 4));
    }
    let text = format!("{value:.digits$}");
    // No "-0.000" for what rounds to zero.
    if size == 0.0 { text.trim_start_matches('-').to_string() } else { text }
}

/// A number with at most `digits` significant digits and no trailing zeros: axis labels, measured
/// values.
pub fn short(value: f64, digits: usize) -> String {
    if !value.is_finite() {
        return float(value, 0);
    }
    if value == 0.0 {
        return "0".into();
    }
    let digits = digits.clamp(1, 15);
    let exponent = value.abs().log10().floor() as i32;
    if !(-4..=8).contains(&exponent) {
        let text = format!("{value:.*e}", digits - 1);
        return match text.split_once('e') {
            Some((mantissa, power)) => format!("{}e{power}", trim(mantissa)),
            None => text,
        };
    }
    let decimals = (digits as i32 - 1 - exponent).max(0) as usize;
    trim(&format!("{value:.decimals$}")).to_string()
}

fn trim(number: &str) -> &str {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number }
}

/// Reads a size: `"4GiB"`, `"512 MB"`, `"1.5G"`, `"65536"`.
///
/// `KiB`, `MiB`, `GiB`, `TiB` and the bare letters `K`, `M`, `G`, `T` are powers of 1024; `KB`,
/// `MB`, `GB`, `TB` are powers of 1000. Case does not count.
///
/// # Errors
/// When the text is not a size, is negative, or does not fit 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let refuse = || format!("`{text}` is not a size; write for example 4GiB, 512MB or 65536");
    let clean = text.trim();
    let split = clean.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'));
    let (number, unit) = clean.split_at(split.unwrap_or(clean.len()));
    let number: f64 = number.replace('_', "").parse().map_err(|_| refuse())?;
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(refuse()),
    };
    let value = number * factor;
    // 2^64: everything below converts without loss of range.
    if !(0.0..18_446_744_073_709_551_616.0).contains(&value) {
        return Err(refuse());
    }
    Ok(value.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_counts_have_three_digits() {
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (1_610_612_736, "1.50 GiB"),
            (1_048_575, "1.00 MiB"),
            (150 << 20, "150 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(value), text, "{value}");
        }
        for (value, text) in [
            (999, "999"),
            (1000, "1.00 k"),
            (3_270_000, "3.27 M"),
            (32_000, "32.0 k"),
            (999_960_000, "1.00 B"),
        ] {
            assert_eq!(count(value), text, "{value}");
        }
    }

    #[test]
    fn times() {
        for (value, text) in [
            (0.0, "0 s"),
            (0.00085, "850 µs"),
            (0.0123, "12 ms"),
            (1.234, "1.23 s"),
            (59.94, "59.9 s"),
            (59.96, "1 min 00 s"),
            (123.4, "2 min 03 s"),
            (3723.0, "1 h 02 min"),
            (90_000.0, "1 d 01 h"),
            (f64::NAN, "unknown"),
        ] {
            assert_eq!(seconds(value), text, "{value}");
        }
    }

    #[test]
    fn shares_and_numbers() {
        assert_eq!(percent(0.1234), "12.3 %");
        assert_eq!(percent(0.000_123_4), "0.012 %");
        assert_eq!(percent(1e-9), "1.0e-7 %");
        assert_eq!(percent(0.0), "0 %");
        assert_eq!(float(1.23456, 3), "1.235");
        assert_eq!(float(1.2e-7, 3), "1.200e-7");
        assert_eq!(float(-0.0, 2), "0.00");
        assert_eq!(float(f64::INFINITY, 2), "∞");
        assert_eq!(short(1234.5678, 4), "1235");
        assert_eq!(short(0.25, 4), "0.25");
        assert_eq!(short(1e-9, 3), "1e-9");
        assert_eq!(short(1.5e12, 3), "1.5e12");
        assert_eq!(short(200.0, 1), "200");
    }

    #[test]
    fn sizes_are_read_back() {
        for (text, value) in [
            ("4GiB", 4 << 30),
            ("4g", 4 << 30),
            ("512 MB", 512_000_000),
            ("1.5k", 1536),
            ("65_536", 65536),
            ("0", 0),
        ] {
            assert_eq!(parse_bytes(text), Ok(value), "{text}");
        }
        for wrong in ["", "GiB", "-1", "4 parsecs", "1e30T", "999999999TiB", "1..2"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }
}
