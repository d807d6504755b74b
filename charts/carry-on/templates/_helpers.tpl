{{/* The release's name, with the chart's unless it says so already; leaves room for the longest suffix. */}}
{{- define "carry-on.fullname" -}}
{{- $name := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) -}}
{{- $name | trunc 48 | trimSuffix "-" -}}
{{- end }}

{{/* The name of everything that belongs to the operator's pods. */}}
{{- define "carry-on.operator" -}}
{{ include "carry-on.fullname" . }}-operator
{{- end }}

{{/* The operator's pods. Children of the three kinds carry the same name label and another component. */}}
{{- define "carry-on.selector" -}}
app.kubernetes.io/name: carry-on
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{/* The pod of `helm test`. */}}
{{- define "carry-on.test" -}}
app.kubernetes.io/name: carry-on
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end }}

{{/* Who reaches pools, trainers and gateways beside each other, in JSON. */}}
{{- define "carry-on.peers" -}}
{{- $namespace := dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace) -}}
{{- $operator := dict "namespaceSelector" $namespace "podSelector" (dict "matchLabels" (include "carry-on.selector" . | fromYaml)) -}}
{{ dict "operator" $operator "scrapers" (.Values.networkPolicies.scrapers | default list) "clients" (.Values.networkPolicies.clients | default list) | toJson }}
{{- end }}

{{/* Labels of what the chart installs. Selects no pod of the operator unless the component label is added. */}}
{{- define "carry-on.labels" -}}
app.kubernetes.io/name: carry-on
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* repository:tag, or repository@digest. `global.imageRegistry` takes the place of the registry: what stands before the first slash, when it is a host. */}}
{{- define "carry-on.image" -}}
{{- $root := index . 0 -}}
{{- with index . 1 -}}
{{- $repository := .repository -}}
{{- with $root.Values.global.imageRegistry -}}
{{- $repository = printf "%s/%s" . (regexReplaceAll "^([^/]*[.:][^/]*|localhost)/" $repository "") -}}
{{- end -}}
{{ $repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $root.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end }}

{{/* `global.imagePullSecrets` and some more. Other charts under the same parent may take bare names in `global`. */}}
{{- define "carry-on.allPullSecrets" -}}
{{- $secrets := list -}}
{{- range concat ((index . 0).Values.global.imagePullSecrets | default list) (index . 1) -}}
{{- $secrets = append $secrets (kindIs "string" . | ternary (dict "name" .) .) -}}
{{- end -}}
{{ $secrets | uniq | toJson }}
{{- end }}

{{/* Pull secrets of the chart's own pods. */}}
{{- define "carry-on.pullSecrets" -}}
{{- with include "carry-on.allPullSecrets" (list . .Values.image.pullSecrets) | fromJsonArray -}}
imagePullSecrets:
{{- toYaml . | nindent 2 }}
{{- end -}}
{{- end }}

{{/* What every worker's pod gets that its object does not name itself. A `$(NAME)` in it is for the worker's container, not for the operator's. */}}
{{- define "carry-on.podDefaults" -}}
{{- $secrets := include "carry-on.allPullSecrets" (list . .Values.worker.imagePullSecrets) | fromJsonArray -}}
{{- $defaults := dict -}}
{{- with $secrets }}{{ $_ := set $defaults "imagePullSecrets" . }}{{ end -}}
{{- with .Values.worker.env }}{{ $_ := set $defaults "env" . }}{{ end -}}
{{- with $defaults }}{{ toJson . | replace "$(" "$$(" }}{{ end -}}
{{- end }}

{{/* One place for all operators of the same namespaces, whoever installed them: only the holder of the Lease works. */}}
{{- define "carry-on.leaseNamespaces" -}}
{{ .Values.watchNamespaces | default (list (.Values.leaseNamespace | default "kube-system")) | toJson }}
{{- end }}

{{- define "carry-on.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "carry-on.operator" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end }}

{{/* The restricted Pod Security Standard with any UID. */}}
{{- define "carry-on.podSecurityContext" -}}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "carry-on.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
