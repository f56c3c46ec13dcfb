{{- define "svc.selector" -}}
app.kubernetes.io/name: svc
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "svc.labels" -}}
{{ include "svc.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "svc.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* The kubelet asks at the pod's address; an agent that listens at one address only has to be asked there. */ -}}
{{- define "svc.probeHost" -}}
{{- $host := .Values.healthzBindAddress | trimSuffix (.Values.healthzBindAddress | splitList ":" | last | printf ":%s") -}}
{{- if not (has $host (list "0.0.0.0" "[::]")) -}}
host: {{ $host | trimPrefix "[" | trimSuffix "]" | quote }}
{{- end -}}
{{- end }}
