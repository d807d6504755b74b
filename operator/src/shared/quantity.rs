//! Kubernetes' resource quantities as numbers.

/// The value of a quantity such as `500m`, `1.5` or `8Gi`; none when it is no quantity.
pub fn value(text: &str) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    // `1E3` is a number, `1E` is an exa.
    if let Ok(number) = text.parse::<f64>() {
        return Some(number).filter(|number| number.is_finite());
    }
    let (digits, factor) = SUFFIXES.iter().find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, factor)))?;
    digits.parse::<f64>().ok().map(|number| number * factor).filter(|number| number.is_finite())
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn the_same_amount_has_many_names() {
        assert_eq!(value("1000m"), value("1"));
        assert_eq!(value("1Gi"), value("1024Mi"));
        assert_eq!(value("1E3"), value("1k"));
        assert_eq!((value("1E"), value(".5"), value("5.")), (Some(1e18), Some(0.5), Some(5.0)));
        assert_eq!((value(""), value("x"), value("1Qi"), value("inf")), (None, None, None, None));
    }
}
