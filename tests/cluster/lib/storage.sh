# Volumes that all nodes share, with no affinity: folders of the file system that all nodes see.

make_storage() {
    local number
    {
        cat <<'YAML'
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: shared, annotations: {storageclass.kubernetes.io/is-default-class: "true"}}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: Immediate
reclaimPolicy: Retain
YAML
        for number in $(seq 12); do volume "pv$number"; done
    } | kubectl_admin apply -f - >"$RUN/storage.log"
}

# volume NAME [NAMESPACE CLAIM] : its folder, and its manifest on standard output; of that claim alone when one is named
volume() {
    mkdir -p "$RUN/volumes/$1"
    chmod 777 "$RUN/volumes/$1"
    cat <<YAML
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: $1}
spec:
  storageClassName: shared
  capacity: {storage: 5Gi}
  accessModes: [ReadWriteMany, ReadWriteOnce, ReadOnlyMany]
  persistentVolumeReclaimPolicy: Retain
  hostPath: {path: $RUN/volumes/$1, type: Directory}
YAML
    [ -z "${2:-}" ] || echo "  claimRef: {namespace: $2, name: $3}"
}
