//! What a plain scalar of YAML is: `kubectl` reads YAML 1.1, by the table of sigs.k8s.io/yaml's goyaml.v2 (`resolve.go`), where `yes` is true,
//! `007` is seven and `1_000` a thousand.

use serde_json::{Number, Value};

const TRUE: [&str; 11] = ["y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"];
const FALSE: [&str; 11] = ["n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"];
const NULL: [&str; 5] = ["", "~", "null", "Null", "NULL"];
/// Numbers that JSON does not have, without their sign.
const NOT_JSON: [&str; 6] = [".nan", ".NaN", ".NAN", ".inf", ".Inf", ".INF"];

/// The value of a plain scalar without a tag.
///
/// # Errors
/// A number that JSON does not have.
pub fn resolve(text: &str) -> Result<Value, String> {
    if TRUE.contains(&text) || FALSE.contains(&text) {
        return Ok(Value::Bool(TRUE.contains(&text)));
    }
    if NULL.contains(&text) {
        return Ok(Value::Null);
    }
    if NOT_JSON.contains(&text.trim_start_matches(['+', '-'])) {
        return Err(format!("{text} is no number that JSON has"));
    }
    let number = match text.as_bytes().first() {
        Some(b'.') => number(text),
        Some(b'+' | b'-' | b'0'..=b'9') => number(&text.replace('_', "")),
        _ => None,
    };
    Ok(number.map_or_else(|| Value::String(text.to_owned()), Value::Number))
}

/// The key that a plain scalar is in JSON, where all are texts; a float is written as Go's `strconv` does with format `g`.
///
/// # Errors
/// A number that JSON does not have, or null.
pub fn key(text: &str) -> Result<String, String> {
    match resolve(text)? {
        Value::Null => Err("a key is null".to_owned()),
        Value::String(name) => Ok(name),
        Value::Number(number) if number.is_f64() => Ok(number.as_f64().map(float).unwrap_or_default()),
        other => Ok(other.to_string()),
    }
}

fn float(number: f64) -> String {
    let scientific = format!("{number:e}");
    match scientific.split_once('e').and_then(|(mantissa, exponent)| Some((mantissa, exponent.parse::<i32>().ok()?))) {
        Some((mantissa, exponent)) if !(-4..6).contains(&exponent) => format!("{mantissa}e{exponent:+03}"),
        _ => number.to_string(),
    }
}

fn number(text: &str) -> Option<Number> {
    if let Some(whole) = integer(text) {
        return i64::try_from(whole).map(Number::from).or_else(|_| u64::try_from(whole).map(Number::from)).ok();
    }
    let decimal = if is_decimal(text) { text.trim_start_matches('+').parse().ok() } else { None };
    decimal.and_then(Number::from_f64)
}

/// As Go's `strconv.ParseInt` with base 0: the prefix says the base.
fn integer(text: &str) -> Option<i128> {
    let (sign, digits) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    let lower = digits.to_ascii_lowercase();
    let (base, digits) = match lower.get(..2) {
        Some("0x") => (16, &digits[2..]),
        Some("0b") => (2, &digits[2..]),
        Some("0o") => (8, &digits[2..]),
        _ if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        _ => (10, digits),
    };
    // A second sign is none that Go takes, and a number with one has the range of i64.
    let whole = if digits.starts_with(['+', '-']) { None } else { i128::from_str_radix(digits, base).ok() }? * sign;
    let largest = if text.starts_with('+') { i128::from(i64::MAX) } else { i128::from(u64::MAX) };
    (i128::from(i64::MIN)..=largest).contains(&whole).then_some(whole)
}

/// `[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`
fn is_decimal(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (mantissa, exponent) = unsigned.split_once(['e', 'E']).map_or((unsigned, None), |(mantissa, exponent)| (mantissa, Some(exponent)));
    let exponent = exponent.is_none_or(|exponent| digits(exponent.strip_prefix(['+', '-']).unwrap_or(exponent)));
    let mantissa = match mantissa.split_once('.') {
        None => digits(mantissa),
        Some(("", fraction)) => digits(fraction),
        Some((whole, fraction)) => digits(whole) && (fraction.is_empty() || digits(fraction)),
    };
    mantissa && exponent
}
