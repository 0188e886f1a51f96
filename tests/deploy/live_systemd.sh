#!/usr/bin/env bash
# A real systemd runs the shipped units: UNITS KVSTORE DIRECTORY. Called in mount and pid
# namespaces of its own, so that nothing outside is touched. Prints what it saw, a line each.
set -eu
units=$1 kvstore=$2 place=$3

mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user0
chmod 700 /run/user0
export XDG_RUNTIME_DIR=/run/user0 XDG_CONFIG_HOME=$place/config XDG_STATE_HOME=$place/state

config=$place/kvstore.toml
cat >"$config" <<EOF
[server]
socket = "$place/kvstore.sock"
[tiers.host]
capacity = "1MiB"
arena = "$place/memory/arena"
EOF
mkdir "$place/memory"
mount -t tmpfs tmpfs "$place/memory"

known=$place/config/systemd/user
mkdir -p "$known/kvstore.service.d"
cp "$units/kvstore.service" "$known"
sed "s#^ListenStream=.*#ListenStream=$place/kvstore.sock#; /^SocketUser/d; /^SocketGroup/d" \
    "$units/kvstore.socket" >"$known/kvstore.socket"
# A manager for one user has no users to choose from, and lays out no file systems in a namespace
# within a namespace. Everything else is as shipped, with a shorter watchdog.
cat >"$known/kvstore.service.d/here.conf" <<EOF
[Service]
ExecStart=
ExecStart=$kvstore serve --config $config
User=
Group=
WatchdogSec=1
TimeoutAbortSec=1
StateDirectory=
RuntimeDirectory=
ConfigurationDirectory=
ProtectHome=no
ProtectSystem=no
ProtectClock=no
ProtectControlGroups=no
ProtectHostname=no
ProtectKernelLogs=no
ProtectKernelModules=no
ProtectKernelTunables=no
PrivateDevices=no
PrivateIPC=no
PrivateTmp=no
RestrictNamespaces=no
StandardError=append:$place/log
EOF

manage() { systemctl --user --no-pager "$@" 2>/dev/null; }
property() { manage show kvstore --property "$1" --value; }
# Waits for up to 20 seconds, as long as its words are a command that fails.
await() { for _ in $(seq 200); do "$@" && return; sleep 0.1; done; echo "not seen: $*"; exit 1; }
has_changed() { [ "$(property MainPID)" -gt 1 ] && [ "$(property MainPID)" != "$1" ]; }
is_active() { [ "$(property ActiveState)" = active ]; }
has_status() { [[ "$(property StatusText)" = "$1"* ]]; }

/lib/systemd/systemd --user --log-level=warning >/dev/null 2>&1 &
manager=$!
trap 'kill $manager; wait' EXIT
await test -S /run/user0/systemd/private

manage start kvstore.socket
echo "before: $(property ActiveState)"
"$kvstore" status --socket "$place/kvstore.sock" >/dev/null && echo "activated: $(property ActiveState)"
echo "status: $(property StatusText)"

sed -i '/^socket/a drain_timeout = "1s"' "$config"
# The signal that asks for it is all that `reload` waits for.
manage reload kvstore
await grep -q "configuration reloaded" "$place/log"
await is_active
echo "reloaded: $(property ActiveState)"
echo 'nonsense = 1' >>"$config"
manage reload kvstore
await has_status "configuration not reloaded"
echo "refused: $(property StatusText)"
sed -i '/nonsense/d' "$config"

first=$(property MainPID)
[ "$first" -gt 1 ] && kill -STOP "$first"
await has_changed "$first"
await is_active
echo "watchdog: restarted $(property NRestarts) time"

second=$(property MainPID)
manage restart kvstore
has_changed "$second" && echo "restarted: $(property ActiveState)"
manage stop kvstore kvstore.socket
echo "stopped: $(property Result)"
