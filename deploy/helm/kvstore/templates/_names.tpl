{{- define "kvstore.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "kvstore.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kvstore.labels" -}}
{{ include "kvstore.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* Whether the admin API is asked from beyond the pod. */}}
{{- define "kvstore.isOpen" -}}
{{- if and .Values.admin.enabled (or .Values.admin.insecure .Values.admin.secret) }}yes{{ end }}
{{- end }}

{{/* The configuration file: what is said in values.config, and what the chart knows better. */}}
{{- define "kvstore.config" -}}
{{- $config := deepCopy .Values.config }}
{{- $_ := set $config "server" (merge (dict "socket" "/run/kvstore/kvstore.sock") (get $config "server" | default dict)) }}
{{- $tiers := get $config "tiers" | default dict }}
{{- if ne .Values.arena.kind "memfd" }}
{{- $_ := set $tiers "host" (merge (dict "arena" "/memory/arena") (get $tiers "host" | default dict)) }}
{{- end }}
{{- if .Values.disk.enabled }}
{{- $_ := set $tiers "disk" (merge (dict "path" "/var/lib/kvstore/disk" "capacity" .Values.disk.capacity) (get $tiers "disk" | default dict)) }}
{{- end }}
{{- $_ := set $config "tiers" $tiers }}
{{- if not .Values.admin.enabled }}
{{- $_ := set $config "admin" (dict "listen" "") }}
{{- else if include "kvstore.isOpen" . }}
{{- $admin := dict "listen" (printf "0.0.0.0:%v" .Values.admin.port) "insecure" .Values.admin.insecure }}
{{- if .Values.admin.secret }}
{{- $_ := set $admin "token_file" "/run/secrets/kvstore/tokens" }}
{{- if not .Values.admin.insecure }}
{{- $_ := set $admin "tls_cert_file" "/run/secrets/kvstore/tls.crt" }}
{{- $_ := set $admin "tls_key_file" "/run/secrets/kvstore/tls.key" }}
{{- end }}
{{- end }}
{{- $_ := set $config "admin" $admin }}
{{- else }}
{{- $_ := set $config "admin" (dict "listen" (printf "127.0.0.1:%v" .Values.admin.port)) }}
{{- end }}
{{- include "kvstore.toml" (dict "path" "" "table" $config) | trim }}
{{- end }}

{{/* TOML, with what JSON and TOML write alike; toToml makes fractions of whole numbers. */}}
{{- define "kvstore.toml" -}}
{{- range $name, $value := .table }}
{{- if not (kindIs "map" $value) }}
{{ $name }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- range $name, $value := .table }}
{{- if kindIs "map" $value }}
[{{ $.path }}{{ $name }}]
{{- include "kvstore.toml" (dict "path" (printf "%s%s." $.path $name) "table" $value) }}
{{- end }}
{{- end }}
{{- end }}
