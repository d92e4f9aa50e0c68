#!/usr/bin/env bash
# All stages one after the other, on as many GPUs as there are. Every stage resumes from its checkpoint in $WORK.
#
#   KIT=... PACK=... REAL=so762.tar VOCABULARY=CosyVoice-BlankEN WORK=... bash recipes/embedded/run.sh
#
# Seconds for each stage can be given in the environment, see below; hours of speech too. Logs are in $WORK/log.
set -uo pipefail
: "${KIT:?folder of the data kit}" "${PACK:?folder of Kokoro}" "${REAL:?tar of real recordings}"
: "${VOCABULARY:?folder that text_vocabulary.py wrote}" "${WORK:?folder for corpora, checkpoints and logs}"
hours=${HOURS:-38} style_hours=${STYLE_HOURS:-2} workers=${WORKERS:-52} style_workers=${STYLE_WORKERS:-3}
t_corpus=${T_CORPUS:-240} t_tokenizer=${T_TOKENIZER:-270} t_speaker=${T_SPEAKER:-200}
t_flow=${T_FLOW:-460} t_lm=${T_LM:-420} t_vocoder=${T_VOCODER:-700} t_tune=${T_TUNE:-80}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
case $gpus in
  1) first=0 second=0 vocoder=0 ;;
  2 | 3) first=0 second=0 vocoder=1 ;;
  *) first=0 second=1 vocoder=2,3 ;;
esac
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
mkdir -p "$WORK/log"
say() { echo "$(date +%T) $*"; }
make_corpus() { python3 -m recipes.embedded.make_corpus --kit "$KIT" "$@"; }
stage() { # GPUs, stage, its arguments
  local devices=$1 name=$2
  shift 2
  local count
  count=$(tr ',' '\n' <<< "$devices" | wc -l)
  say "$name begins on GPU $devices"
  CUDA_VISIBLE_DEVICES=$devices python3 -m torch.distributed.run --nproc-per-node "$count" --master-port $((29500 + RANDOM % 400)) \
    -m "recipes.embedded.$name" --kit "$KIT" "$@" >> "$WORK/log/$name.log" 2>&1
  say "$name ends ($?)"
}

if [ ! -e "$WORK/corpora" ]; then
  say "corpus: $hours h plain, $style_hours h each of four styles"
  make_corpus --style plain -- --pack "$PACK" --output "$WORK/plain" --hours "$hours" --workers "$workers" --seed 0 \
    --time-limit "$t_corpus" > "$WORK/log/corpus.log" 2>&1 &
  seed=10
  for style in slow fast low high; do
    make_corpus --style $style -- --pack "$PACK" --output "$WORK/$style" --hours "$style_hours" \
      --workers "$style_workers" --seed $((seed += 1)) --time-limit "$t_corpus" > "$WORK/log/corpus-$style.log" 2>&1 &
  done
  make_corpus --real "$REAL" --output "$WORK/real" > "$WORK/log/corpus-real.log" 2>&1 &
  wait
  tail -qn 1 "$WORK"/log/corpus*.log
  touch "$WORK/corpora"
fi
spoken="$WORK/plain $WORK/slow $WORK/fast $WORK/low $WORK/high"
all="$spoken $WORK/real"

stage "$vocoder" vocoder --corpus $spoken --checkpoint "$WORK/vocoder.pt" --time-limit "$t_vocoder" --batch 24 &
stage "$second" speaker_encoder --corpus $all --checkpoint "$WORK/speaker_encoder.pt" --time-limit "$t_speaker" &
encoder=$!
stage "$first" speech_tokenizer --corpus $all --checkpoint "$WORK/speech_tokenizer.pt" --time-limit "$t_tokenizer"
wait $encoder
inputs="--speech-tokenizer $WORK/speech_tokenizer.pt"
stage "$first" speech_lm --corpus $all --checkpoint "$WORK/speech_lm.pt" --time-limit "$t_lm" $inputs \
  --vocabulary "$VOCABULARY" &
stage "$second" flow --corpus $all --checkpoint "$WORK/flow.pt" --time-limit "$t_flow" $inputs \
  --speaker-encoder "$WORK/speaker_encoder.pt" &
wait
cp "$WORK/vocoder.pt" "$WORK/vocoder-before-tuning.pt"
stage "$vocoder" vocoder --corpus $spoken --checkpoint "$WORK/vocoder.pt" --time-limit "$t_tune" --batch 24 \
  --learning-rate 2e-4 --flow "$WORK/flow.pt" $inputs --speaker-encoder "$WORK/speaker_encoder.pt"
say "done"
