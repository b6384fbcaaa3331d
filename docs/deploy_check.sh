#!/usr/bin/env bash
# Runs the commands and files of docs/deploy.md on a throw-away copy of this machine, booted with systemd and without a
# network, and looks at what they promise. As root on Debian 12 with systemd-container, .venv ready; needs 4 GB of memory and
# 3 to 7 minutes. Nothing stays.
set -Eeuo pipefail

if [ "${1:-}" != inside ]; then
    [ "${1:-}" = apart ] || exec unshare --mount --pid --fork --mount-proc --kill-child -- "$(realpath "$0")" apart
    cd "$(dirname "$0")/.."
    project=$PWD top=$(mktemp -d)
    trap 'umount --lazy "$top/system" "$top" 2>/dev/null; rmdir "$top"' EXIT
    mount -t tmpfs tmpfs "$top"
    mkdir "$top"/{changes,work,system}
    mount -t overlay overlay -o "lowerdir=/,upperdir=$top/changes,workdir=$top/work" "$top/system"
    copy=$top/system/srv/deploy
    mkdir -p "$copy"
    awk -v to="$copy/" '/^```/ { if (out) { close(out); out = "" } else if (NF == 2) {
        out = $2; gsub("/", "%", out); out = to out; next } } out { print >> out }' docs/deploy.md
    sed -i 's|https://s3.example.org|http://127.0.0.1:9000|' "$copy/server"
    sed "s|PROJECT|$project|" >"$top/system/etc/systemd/system/deploy-check.service" <<'U'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
StandardOutput=file:/srv/deploy/log
StandardError=inherit
ExecStart=PROJECT/docs/deploy_check.sh inside
ExecStopPost=/bin/sh -c 'echo $EXIT_STATUS > /srv/deploy/status; systemctl poweroff --no-block'
U
    ln -s ../deploy-check.service "$top/system/etc/systemd/system/multi-user.target.wants/"
    echo "installing"
    chroot "$top/system" env PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive bash -euc '
        mount -t proc proc /proc; mount --bind /dev /dev 2>/dev/null || mount -t devtmpfs dev /dev
        . /srv/deploy/install; apt-get install -y openssh-server; python3 -m venv /opt/moto; /opt/moto/bin/pip install "moto[server]==5.2.5"
        umount /dev /proc' >"$copy/install.log" 2>&1 || { tail "$copy/install.log"; exit 1; }
    echo 198.51.100.7 mlflow.example.org >>"$top/system/etc/hosts"
    touch "$copy/log"
    tail -f "$copy/log" &
    systemd-nspawn --quiet --directory "$top/system" --bind-ro "$project" --bind-ro "$(realpath .venv)" --private-network \
        --register=no --keep-unit --boot --console=pipe </dev/null >"$copy/boot.log" 2>&1 || true
    sleep 1
    [ -e "$copy/status" ] || { tail "$copy/boot.log"; exit 1; }
    exit "$(cat "$copy/status")"
fi

# ---- inside the copy
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=~root
cd "$(dirname "$0")/.."
project=$PWD
at=/srv/deploy
trap 'echo "FAILED in line $LINENO"; journalctl -u mlflow --no-pager -n 30' ERR
run() { echo "== $1"; (cd "$project" && PATH="$project/.venv/bin:$PATH" bash -euo pipefail "$at/$1"); }
is() { if [ "$2" = "$3" ]; then echo "ok   $1: $2"; else echo "FAIL $1: $2, not $3"; false; fi; }
code() { curl -s -m 20 -o /dev/null -w '%{http_code}' --cacert /etc/ssl/certs/mlflow.pem "$@" || true; }
search() { code -X POST -H 'Content-Type: application/json' -d '{"experiment_ids": ["0"]}' "$@"; }

for file in "$at"/%*; do name=${file##*/}; cp "$file" "${name//%//}"; done
ip address add 198.51.100.7/32 dev lo  # an address that other machines would use
cat >/etc/systemd/system/s3.service <<U
[Service]
ExecStart=/opt/moto/bin/moto_server -H 127.0.0.1 -p 9000
U
systemctl start s3
timeout 60 sh -c 'until curl -fs -o /dev/null -X PUT http://127.0.0.1:9000/gaplab-artifacts; do sleep 1; done'
systemctl stop nginx

run server
echo
(. $at/proxy) >"$at/passwords" || { cat "$at/passwords"; false; }
secret() { awk -v name="$1" '$1 == name && NF == 2 { print $2 }' "$at/passwords"; }
ada=ada:$(secret ada) grace=grace:$(secret grace)
(umask 077; echo "machine mlflow.example.org login grace password $(secret grace)" >~/.netrc)
run check | tee "$at/check.log"
is "the page's own check" "$(sed -n 2,3p "$at/check.log" | tr '\n' ' ')$(tail -1 "$at/check.log" | tr -d "}")" "401 200 port 5000 is closed: good"

echo "== who gets in"
site=https://mlflow.example.org api=https://mlflow.example.org/api/2.0/mlflow ajax=https://mlflow.example.org/ajax-api/2.0/mlflow
is "no password" "$(code $site/)" 401
is "no password, health" "$(code $site/health)" 401
is "wrong password" "$(code -u grace:guess $site/)" 401
is "a password" "$(code -u "$grace" $site/)" 200
is "plain http" "$(code http://mlflow.example.org/)" 301
is "foreign name, TLS" "$(code -k --resolve evil.example:443:198.51.100.7 -u "$grace" https://evil.example/)" 000
is "foreign Host header, nginx" "$(code -u "$grace" -H 'Host: evil.example' $site/)" 000
is "foreign Host header, MLflow" "$(code -H 'Host: evil.example' http://127.0.0.1:5000/)" 403
is "MLflow past nginx, and its health" "$(code http://127.0.0.1:5000/) $(code http://127.0.0.1:5000/health)" "403 200"
is "MLflow from another address" "$(code http://198.51.100.7:5000/health)" 000
is "PostgreSQL from another address" "$(pg_isready -q -h 198.51.100.7 || echo closed)" closed
is "the UI's own request" "$(search -u "$grace" -H "Origin: $site" $ajax/runs/search)" 200
is "another site's request" "$(search -u "$grace" -H 'Origin: https://evil.example' $ajax/runs/search)" 403
for path in runs/delete runs/%64elete experiments/delete; do
    is "$path by grace, by ada" "$(search -u "$grace" $api/$path) $(search -u "$ada" $api/$path)" "403 400"
done
is "webhooks by grace, by ada" "$(code -u "$grace" $api/webhooks) $(code -u "$ada" $api/webhooks)" "403 200"
is "DELETE by grace" "$(code -X DELETE -u "$grace" $site/api/2.0/mlflow-artifacts/artifacts/0/x)" 403
is "ada's name, another's password" "$(code -X DELETE -u "ada:$(secret grace)" $api/registered-models/delete)" 401
. /etc/mlflow/mlflow.env
(umask 077; printf '%s\n' "$PGPASSWORD" "$AWS_SECRET_ACCESS_KEY" >$at/secrets; head -1 $at/secrets >$at/secret)
lines() { cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' >$at/lines || true; }  # grep's own would count, if it held them
lines
is "secrets on command lines" "$(grep -cFf $at/secrets $at/lines || true)" 0
bash -c 'sleep 30; : "$1"' bash "x$PGPASSWORD" & sleep 0.5; lines; kill $!
is "one put there on purpose" "$(grep -cFf $at/secrets $at/lines || true)" 1
is "secrets in the journal" "$(journalctl --no-pager | grep -cFf $at/secret || true)" 0
is "the file of secrets" "$(stat -c '%U %a' /etc/mlflow/mlflow.env)" "root 600"
is "other users read it" "$(runuser -u nobody -- cat /etc/mlflow/mlflow.env 2>/dev/null || echo refused)" refused
ssh-keygen -q -t ed25519 -N "" -f $at/key
install -D -m 0600 $at/key.pub ~/.ssh/authorized_keys
systemctl start ssh
ssh -i $at/key -o StrictHostKeyChecking=no -o LogLevel=ERROR -f -N -L 5001:127.0.0.1:5000 root@198.51.100.7
is "ssh tunnel: another port, the right Host" "$(code http://localhost:5001/) $(code -H 'Host: mlflow.example.org' http://localhost:5001/)" "403 200"
unset PGPASSWORD "${!AWS_@}" "${!MLFLOW_@}"

echo "== gaplab"
mkdir -p -m 0700 ~/.mlflow
printf '[mlflow]\nmlflow_tracking_username = grace\nmlflow_tracking_password = %s\n' "$(secret grace)" >~/.mlflow/credentials
cp -r data ~/data  # the project is read-only here
sed -i 's|tracking.uri|data.root=$HOME/data data.train_size=1000 data.valid_size=500 trainer.max_epochs=2 figures=false paths.outputs=$HOME/outputs tracking.uri|' $at/client
run client
cat >$at/look.py <<'P'
import sys, time
from pathlib import Path
from mlflow import MlflowClient
client = MlflowClient("https://mlflow.example.org")
experiment = client.get_experiment_by_name("gaplab")
runs = client.search_runs([experiment.experiment_id])
children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
assert len(runs) == 6 and len(children) == 4, (len(runs), len(children))
for run in runs:
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert run.info.status == "FINISHED", run.info
    if run.info.run_id in {child.info.run_id for child in children} or "sweep" not in run.data.tags:
        assert run.data.params["model.name"] == "mlp" and run.data.metrics["gap/acc"] is not None and files, run.data
        assert run.inputs.dataset_inputs[0].dataset.digest
    print(run.info.run_name, run.info.status, len(run.data.params), "parameters", len(run.data.metrics), "metrics", files)
print("artifact root of the experiment:", experiment.artifact_location)
if sys.argv[1:] == ["big"]:
    big = Path("/srv/big.bin")
    big.write_bytes(bytes(range(256)) * 2**18)  # 64 MiB
    begin = time.monotonic()
    client.log_artifact(runs[0].info.run_id, str(big))
    sent = time.monotonic()
    Path("/srv/back").mkdir()
back = client.download_artifacts(runs[0].info.run_id, "big.bin", "/srv/back")
assert Path(back).read_bytes() == Path("/srv/big.bin").read_bytes()
if sys.argv[1:] == ["big"]:
    print(f"64 MiB up in {sent - begin:.1f} s, down in {time.monotonic() - sent:.1f} s")
P
look() {  # with the password in the environment; the training has it in a file
    HOME=/nowhere MLFLOW_TRACKING_USERNAME=grace MLFLOW_TRACKING_PASSWORD=$(secret grace) \
        MLFLOW_TRACKING_SERVER_CERT_PATH=/etc/ssl/certs/mlflow.pem "$project/.venv/bin/python" $at/look.py "$@" 2>/dev/null
}
look big
is "artifacts in the bucket" "$(curl -s http://127.0.0.1:9000/gaplab-artifacts | grep -o '<Key>mlflow/' | head -1)" "<Key>mlflow/"
echo "connections to PostgreSQL: $(runuser -u postgres -- psql -At -d postgres -c "SELECT count(*) FROM pg_stat_activity WHERE usename = 'mlflow'")"
echo "database: $(runuser -u postgres -- psql -At -d postgres -c "SELECT pg_size_pretty(pg_database_size('mlflow'))")"

run backup
is "the backup" "$(stat -c %a /var/backups/mlflow)" 700
run restore
timeout 120 sh -c 'until curl -fs http://127.0.0.1:5000/health; do sleep 1; done'; echo
look

echo "== when things break"
systemctl stop postgresql@15-main
is "no database: health, a search" "$(code http://127.0.0.1:5000/health) $(search -u "$grace" $api/runs/search)" "200 503"
systemctl start postgresql@15-main
is "database again" "$(search -u "$grace" $api/runs/search)" 200
kill -9 "$(systemctl show -p MainPID --value mlflow)"
sleep 3
timeout 120 sh -c 'until curl -fs http://127.0.0.1:5000/health; do sleep 1; done'; echo
is "MLflow killed and restarted" "$(search -u "$grace" $api/runs/search)" 200
echo "all of docs/deploy.md holds"
