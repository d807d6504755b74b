//! The API server's audit log.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

/// A request that wrote something, or tried to, or was the operator's. What does not apply is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    /// `create`, `update`, `patch`, `delete` or `deletecollection`; of what reads `get`, `list` or `watch`.
    pub verb: String,
    /// Who, or in whose name, such as `system:serviceaccount:NAMESPACE:NAME`.
    pub user: String,
    /// What program, by its own word.
    pub user_agent: String,
    /// API group.
    pub group: String,
    /// Plural, as in URLs.
    pub resource: String,
    /// `status`, `scale` and the like.
    pub subresource: String,
    /// Of the object.
    pub namespace: String,
    /// Of the object.
    pub name: String,
    /// HTTP status of the answer.
    pub code: u64,
    /// When it arrived.
    pub at: Timestamp,
    /// From then to the answer.
    pub took: Duration,
}

impl AuditEntry {
    /// Whether it changes something, or tries to.
    pub fn writes(&self) -> bool {
        !["get", "list", "watch"].contains(&self.verb.as_str())
    }
}

/// The entries of a log from this byte on. A line still being written is left for the next time.
pub fn read(log: &Path, from: u64) -> Vec<AuditEntry> {
    let mut text = String::new();
    let read = File::open(log).and_then(|mut file| file.seek(SeekFrom::Start(from)).and_then(|_| file.read_to_string(&mut text)));
    read.unwrap_or_else(|error| panic!("{}: {error}", log.display()));
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| entry(&serde_json::from_str(line).expect("the audit log is JSON lines"))).collect()
}

fn entry(event: &Value) -> AuditEntry {
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let time = |pointer: &str| text(pointer).parse::<Timestamp>().expect("the audit log has times");
    let at = time("/requestReceivedTimestamp");
    let acted = text("/impersonatedUser/username");
    AuditEntry {
        verb: text("/verb"),
        user: if acted.is_empty() { text("/user/username") } else { acted },
        user_agent: text("/userAgent"),
        group: text("/objectRef/apiGroup"),
        resource: text("/objectRef/resource"),
        subresource: text("/objectRef/subresource"),
        namespace: text("/objectRef/namespace"),
        name: text("/objectRef/name"),
        code: event.pointer("/responseStatus/code").and_then(Value::as_u64).unwrap_or_default(),
        at,
        took: time("/stageTimestamp").duration_since(at).try_into().unwrap_or_default(),
    }
}
