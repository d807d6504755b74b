//! Kubernetes' resource quantities as numbers.

use std::fmt;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

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
    // `inf` is a number to Rust.
    if !text.starts_with(|first: char| first == '.' || first.is_ascii_digit()) {
        return None;
    }
    // `1E3` is a number, `1E` is an exa.
    if let Ok(number) = text.parse::<f64>() {
        return Some(number);
    }
    let (digits, factor) = SUFFIXES.iter().find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, factor)))?;
    digits.parse::<f64>().ok().map(|number| number * factor)
}

/// Bytes, written as a quantity; a part of one counts as a whole one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Quantity", into = "u64")]
pub struct Bytes(pub u64);

impl Bytes {
    /// Reads a quantity; none when it is no quantity.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // more than there can be is as much as there can be
    pub fn read(text: &str) -> Option<Self> {
        value(text).map(|bytes| Self(bytes.ceil() as u64))
    }
}

impl TryFrom<Quantity> for Bytes {
    type Error = String;

    fn try_from(Quantity(text): Quantity) -> Result<Self, Self::Error> {
        Self::read(&text).ok_or_else(|| format!("{text:?} is no quantity"))
    }
}

impl From<Bytes> for u64 {
    fn from(Bytes(bytes): Bytes) -> Self {
        bytes
    }
}

impl fmt::Display for Bytes {
    /// With the largest suffix that loses nothing: `1536Mi`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        let power = if self.0 == 0 { 0 } else { self.0.trailing_zeros() / 10 };
        write!(formatter, "{}{}", self.0 >> (10 * power), SUFFIXES[power as usize])
    }
}

impl JsonSchema for Bytes {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Bytes".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schema()
    }
}

/// A quantity as Kubernetes writes it: `2` and `"500m"` are both good.
pub(crate) fn schema() -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "anyOf": [{ "type": "integer" }, { "type": "string" }],
        "pattern": "^([0-9]+|[0-9]+\\.[0-9]*|\\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$",
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::*;

    #[test]
    fn the_same_amount_has_many_names() {
        assert_eq!(value("1000m"), value("1"));
        assert_eq!(value("1Gi"), value("1024Mi"));
        assert_eq!(value("1E3"), value("1k"));
        assert_eq!((value("1E"), value(".5"), value("5.")), (Some(1e18), Some(0.5), Some(5.0)));
        assert_eq!((value(""), value("x"), value("1Qi"), value("inf")), (None, None, None, None));
    }

    #[test]
    fn bytes_are_written_as_a_number_and_shown_as_a_quantity() {
        let read = |given: serde_json::Value| from_value::<Bytes>(given).unwrap();
        for (given, bytes, shown) in [
            (json!("8Gi"), 8 << 30, "8Gi"),
            (json!("1.5Gi"), 3 << 29, "1536Mi"),
            (json!("1e9"), 1_000_000_000, "1000000000"),
            (json!(4096), 4096, "4Ki"),
            (json!("500m"), 1, "1"),
            (json!("0"), 0, "0"),
            (json!("1e400"), u64::MAX, "18446744073709551615"),
        ] {
            assert_eq!((read(given.clone()), read(given.clone()).to_string().as_str()), (Bytes(bytes), shown), "{given}");
            assert_eq!((to_value(read(given)).unwrap(), read(json!(bytes))), (json!(bytes), Bytes(bytes)));
        }
        assert!(from_value::<Bytes>(json!("lots")).is_err());
    }
}
