//! The way to Services where the test is not in the nodes' network.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};

use carryon_tests::cluster::TestCluster;

/// `kubectl proxy`, until it is dropped.
pub struct Proxy {
    kubectl: Child,
    pub url: String,
}

impl Proxy {
    pub fn start(cluster: &TestCluster) -> Self {
        let mut kubectl = cluster.command("kubectl").args(["proxy", "--port=0"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(kubectl.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (_, address) = line.trim().rsplit_once(' ').unwrap_or_else(|| panic!("kubectl proxy: {line}"));
        Self { kubectl, url: format!("http://{address}") }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}
