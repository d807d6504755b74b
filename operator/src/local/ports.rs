//! Ports on the loopback interface, one for each port of a pod, kept over restarts.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;

use carryon_crds::names;
use serde_json::json;

use super::store::write_json;

/// `POD:PORT` → port on 127.0.0.1.
pub struct Ports {
    file: PathBuf,
    assigned: BTreeMap<String, u16>,
}

impl Ports {
    /// Reads the assignments of earlier runs; a broken file is like none.
    pub fn open(file: PathBuf) -> Self {
        let assigned = std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Self { file, assigned }
    }

    /// The local port of `pod`'s port `port`: that of the last time when it is free, else the same number for a gateway, else any.
    pub fn assign(&mut self, pod: &str, port: i32) -> io::Result<u16> {
        let key = format!("{pod}:{port}");
        let before = self.assigned.get(&key).copied();
        if let Some(before) = before.filter(|before| is_free(*before)) {
            return Ok(before);
        }
        let own = u16::try_from(port).ok().filter(|own| port == names::GATEWAY_PORT && !self.taken(*own, &key) && is_free(*own));
        let chosen = match own {
            Some(own) => own,
            None => self.any()?,
        };
        self.assigned.insert(key, chosen);
        write_json(&self.file, &json!(self.assigned))?;
        Ok(chosen)
    }

    fn taken(&self, port: u16, by_other_than: &str) -> bool {
        self.assigned.iter().any(|(key, assigned)| *assigned == port && key != by_other_than)
    }

    fn any(&self) -> io::Result<u16> {
        for _ in 0..100 {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            if !self.taken(port, "") {
                return Ok(port);
            }
        }
        Err(io::Error::other("no free port on 127.0.0.1"))
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}
