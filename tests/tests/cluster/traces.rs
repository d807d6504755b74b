//! What a cluster would leave on the machine: processes, mounts, cgroups, files.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;

use carryon_tests::cluster::TestCluster;

/// How a cluster's own things are known.
pub struct Traces {
    folder: String,
    namespaces: BTreeSet<PathBuf>,
    /// The same, held open: nobody else gets their numbers.
    _open: Vec<File>,
    cgroups: Vec<PathBuf>,
}

/// Of a cluster that runs: its folder, the namespaces its processes live in, its cgroups.
pub fn of(cluster: &TestCluster) -> Traces {
    let kubeconfig = cluster.command("printenv").arg("KUBECONFIG").output().unwrap();
    let kubeconfig = String::from_utf8(kubeconfig.stdout).unwrap();
    let folder = kubeconfig.trim().strip_suffix("/kubeconfig").unwrap().to_owned();
    let read = |file: &str| {
        let files = fs::read_dir(&folder).unwrap().filter_map(|entry| fs::read_to_string(entry.unwrap().path().join(file)).ok());
        files.flat_map(|text| text.lines().map(String::from).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    let (pids, cgroups) = (read("init.pid"), read("cgroups"));
    let files: Vec<_> = pids.iter().flat_map(|pid| ["net", "mnt"].map(|kind| format!("/proc/{pid}/ns/{kind}"))).collect();
    let traces = Traces {
        _open: files.iter().map(|file| File::open(file).unwrap()).collect(),
        namespaces: files.iter().map(|file| fs::read_link(file).unwrap()).collect(),
        cgroups: cgroups.into_iter().map(PathBuf::from).collect(),
        folder,
    };
    assert!(!traces.namespaces.is_empty() && !traces.cgroups.is_empty());
    assert!(traces.found().len() > traces.cgroups.len() + 4, "a cluster that runs leaves traces: {:?}", traces.found());
    traces
}

impl Traces {
    /// Those that are there now.
    pub fn found(&self) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
        for process in processes.filter(|path| path.file_name().unwrap().to_string_lossy().parse::<u32>().is_ok()) {
            // A process that has ended and whose status nobody has fetched has neither command line nor namespaces.
            let line = fs::read(process.join("cmdline")).unwrap_or_default();
            let lives_inside = ["net", "mnt"].iter().any(|kind| {
                let namespace = fs::read_link(process.join("ns").join(kind));
                namespace.is_ok_and(|namespace| self.namespaces.contains(&namespace))
            });
            if lives_inside || String::from_utf8_lossy(&line).contains(&self.folder) {
                found.push(format!("process {}", String::from_utf8_lossy(&line).replace('\0', " ")));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        found.extend(mounts.lines().filter(|line| line.contains(&self.folder)).map(|line| format!("mount {line}")));
        found.extend(self.cgroups.iter().filter(|group| group.exists()).map(|group| format!("cgroup {}", group.display())));
        found.extend(fs::exists(&self.folder).unwrap().then(|| format!("folder {}", self.folder)));
        found
    }
}
