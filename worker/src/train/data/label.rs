//! What a label says, by the task. Pure.

use carryon_crds::job::Task;
use serde_json::Value;

use super::Rules;
use super::record::kind;
use super::sample::Target;

/// Largest number that is learned, either way.
const LARGEST: f64 = 1e12;

/// What is learned from `label`; the error names the field.
pub fn target(label: Value, rules: &Rules<'_>) -> Result<Target, String> {
    match (rules.task, label) {
        (Task::Regression, label) => number(&label).map(Target::Value),
        (Task::MultiLabelClassification, Value::Array(names)) => several(names, rules.labels).map(Target::Labels),
        (Task::MultiLabelClassification, label) => Err(format!("field `label` is {}, not a list of labels", kind(&label))),
        (_, label) => Ok(Target::Label(index(&name(label, "label")?, rules.labels)?)),
    }
}

fn number(label: &Value) -> Result<f64, String> {
    match label.as_f64() {
        Some(number) if number.abs() <= LARGEST => Ok(number),
        Some(_) => Err(format!("field `label` is {label}, beyond ±{LARGEST:e}")),
        None => Err(format!("field `label` is {}, not a number", kind(label))),
    }
}

/// Indices of the labels named, ascending.
fn several(names: Vec<Value>, labels: &[String]) -> Result<Vec<u32>, String> {
    let indices = names.into_iter().enumerate().map(|(place, label)| index(&name(label, &format!("label[{place}]"))?, labels));
    let mut indices = indices.collect::<Result<Vec<u32>, String>>()?;
    indices.sort_unstable();
    match indices.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(twice) => Err(format!("field `label` has {:?} twice", labels[twice[0] as usize])),
        None => Ok(indices),
    }
}

fn name(label: Value, field: &str) -> Result<String, String> {
    match label {
        Value::String(label) => Ok(label),
        Value::Number(label) => Ok(label.to_string()),
        Value::Bool(label) => Ok(label.to_string()),
        other => Err(format!("field `{field}` is {}, not a string", kind(&other))),
    }
}

fn index(label: &str, labels: &[String]) -> Result<u32, String> {
    let known = labels.iter().position(|name| name == label);
    known.map(|index| index as u32).ok_or_else(|| format!("field `label` is {label:?}, head.labels has {}", labels.join(", ")))
}
