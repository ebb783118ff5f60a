# Use an installed package from an empty folder: sh -e installed_package.sh BIN, the folder of its commands.
BIN=$1
$BIN/lfm --version
$BIN/lfm config list | grep -q ffhq_256_unet
$BIN/lfm config new --task class --image-size 64 --size small > mine.yaml
$BIN/lfm scenes scenes --num 64 --image-size 32
$BIN/lfm shard scenes/images raw --image-size 32
$BIN/lfm encode raw latents
SMALL="--set run=run --set data.shards=latents --set train.num_steps=2 --set train.warmup_steps=0 --set train.global_batch=4"
$BIN/lfm train --config demo $SMALL --dry-run
$BIN/lfm train --config demo $SMALL --num-gpus 2
$BIN/lfm sample run --out samples --seeds 0-1 --num-steps 2
test -s samples/grid.png
$BIN/lfm demo
test -s demo/samples/grid.png
$BIN/lfm ui run --port 7861 &
PAGE=$!
trap 'kill $PAGE' EXIT
$BIN/python -c "
import json, time, urllib.request
for _ in range(120):
    try:
        page = json.load(urllib.request.urlopen('http://127.0.0.1:7861/config'))
        break
    except OSError:
        time.sleep(1)
assert page['title'] == 'lfm', page['title']
assert any('crescent' in json.dumps(part) for part in page['components'])
"
echo "the installed package works"
