{{- define "everstep.labels" -}}
everstep.dev/run: {{ .Release.Name }}
app.kubernetes.io/name: everstep
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "everstep.image" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "everstep.pod" -}}
serviceAccountName: {{ .Release.Name }}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  fsGroup: 1000
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "everstep.env" -}}
{{- if not (or .Values.security.certificates .Values.security.insecureNetwork) }}
{{- fail "set security.certificates (a secret with the files that `everstep certs` writes), or security.insecureNetwork=true on a trusted pod network" }}
{{- end }}
{{- if .Values.security.certificates }}
- name: EVERSTEP_CERTS
  value: /certs
{{- end }}
{{- if .Values.security.token }}
- name: EVERSTEP_TOKEN_FILE
  value: /token/token
{{- end }}
{{- if .Values.security.insecureNetwork }}
- name: EVERSTEP_INSECURE_NETWORK
  value: "1"
{{- end }}
{{- end }}

{{- define "everstep.mounts" -}}
{{- if .Values.security.certificates }}
- name: certs
  mountPath: /certs
  readOnly: true
{{- end }}
{{- if .Values.security.token }}
- name: token
  mountPath: /token
  readOnly: true
{{- end }}
{{- end }}

{{- define "everstep.volumes" -}}
{{- if .Values.security.certificates }}
- name: certs
  secret:
    secretName: {{ .Values.security.certificates }}
{{- end }}
{{- if .Values.security.token }}
- name: token
  secret:
    secretName: {{ .Values.security.token }}
{{- end }}
{{- end }}
