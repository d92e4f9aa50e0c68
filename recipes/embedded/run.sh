#!/usr/bin/env bash
# All stages one after the other, on as many GPUs as there are. Every stage resumes from its checkpoint in $WORK.
#
#   KIT=... PACK=... REAL=so762.tar VOCABULARY=CosyVoice-BlankEN WORK=... bash recipes/embedded/run.sh
#
# Hours of speech can be given in the environment, and the seconds of all stages: TIMES="corpus tokenizer speaker flow lm
# vocoder tuning". Logs are in $WORK/log. A stage that fails starts again, with the code as it is then and without graphs.
set -uo pipefail
: "${KIT:?folder of the data kit}" "${PACK:?folder of Kokoro}" "${REAL:?tar of real recordings}"
: "${VOCABULARY:?folder that text_vocabulary.py wrote}" "${WORK:?folder for corpora, checkpoints and logs}"
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
case $gpus in
  1) first=0 second=0 vocoder=0 times="200 230 160 680 420 920 130" workers=${WORKERS:-5} ;;
  2) first=0 second=0 vocoder=1 times="200 230 160 560 400 800 90" workers=${WORKERS:-8} ;;
  3) first=0 second=1 vocoder=2 times="140 230 200 800 800 1070 110" workers=${WORKERS:-12} ;;
  *) first=0 second=1 vocoder=2,3 times="150 230 200 460 420 700 80" workers=${WORKERS:-12} ;;
esac
read -r t_corpus t_tokenizer t_speaker t_flow t_lm t_vocoder t_tune <<< "${TIMES:-$times}"
hours=${HOURS:-80} style_hours=${STYLE_HOURS:-1.5}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
mkdir -p "$WORK/log"
say() { echo "$(date +%T) $*"; }
make_corpus() { python3 -m recipes.embedded.make_corpus --kit "$KIT" "$@"; }
stage() { # GPUs, seconds, stage, its arguments
  local devices=$1 seconds=$2 name=$3 end=$((SECONDS + $2)) launch=(python3) count code eager=""
  shift 3
  count=$(tr ',' '\n' <<< "$devices" | wc -l)
  ((count > 1)) && launch=(python3 -m torch.distributed.run --nproc-per-node "$count" --master-port $((29500 + RANDOM % 400)))
  while ((seconds > 20)); do
    say "$name begins on GPU $devices: $seconds s"
    CUDA_VISIBLE_DEVICES=$devices "${launch[@]}" -m "recipes.embedded.$name" --kit "$KIT" --time-limit "$seconds" "$@" $eager \
      >> "$WORK/log/$name.log" 2>&1
    code=$?
    say "$name ends ($code)"
    ((code)) || break
    eager=--eager
    sleep 3
    seconds=$((end - SECONDS))
  done
}

if [ ! -e "$WORK/corpora" ]; then
  say "corpus: $hours h plain, $style_hours h each of four styles"
  make_corpus --style plain -- --pack "$PACK" --output "$WORK/plain" --hours "$hours" --workers "$workers" --seed 0 \
    --time-limit "$t_corpus" > "$WORK/log/corpus.log" 2>&1 &
  seed=10
  for style in slow fast low high; do
    CUDA_VISIBLE_DEVICES=$((seed % gpus)) make_corpus --style $style -- --pack "$PACK" --output "$WORK/$style" --hours "$style_hours" --workers 1 \
      --seed $((seed += 1)) --time-limit "$t_corpus" > "$WORK/log/corpus-$style.log" 2>&1 &
  done
  make_corpus --real "$REAL" --output "$WORK/real" > "$WORK/log/corpus-real.log" 2>&1 &
  wait
  tail -qn 1 "$WORK"/log/corpus*.log
  touch "$WORK/corpora"
fi
spoken=""
for style in plain slow fast low high; do
  [ -s "$WORK/$style/style.txt" ] && spoken="$spoken $WORK/$style"
done
all="$spoken $WORK/real"

stage "$vocoder" "$t_vocoder" vocoder --corpus $spoken --checkpoint "$WORK/vocoder.pt" --batch 16 &
stage "$second" "$t_speaker" speaker_encoder --corpus $all --checkpoint "$WORK/speaker_encoder.pt" &
encoder=$!
stage "$first" "$t_tokenizer" speech_tokenizer --corpus $all --checkpoint "$WORK/speech_tokenizer.pt"
wait $encoder
inputs="--speech-tokenizer $WORK/speech_tokenizer.pt"
stage "$first" "$t_lm" speech_lm --corpus $all --checkpoint "$WORK/speech_lm.pt" $inputs --vocabulary "$VOCABULARY" &
stage "$second" "$t_flow" flow --corpus $all --checkpoint "$WORK/flow.pt" $inputs \
  --speaker-encoder "$WORK/speaker_encoder.pt" &
wait
cp "$WORK/vocoder.pt" "$WORK/vocoder-before-tuning.pt"
stage "$vocoder" "$t_tune" vocoder --corpus $spoken --checkpoint "$WORK/vocoder.pt" --batch 16 --learning-rate 2e-4 \
  --flow "$WORK/flow.pt" $inputs --speaker-encoder "$WORK/speaker_encoder.pt"
say "done"
