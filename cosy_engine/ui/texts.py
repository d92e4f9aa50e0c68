"""Every text of the page, in English and Chinese."""

from __future__ import annotations

import gradio as gr

_TEXTS: dict[str, tuple[str, str]] = {
    "text": ("Text to speak", "要合成的文本"),
    "text_hint": ("Type or paste what the voice shall say.", "输入或粘贴要朗读的内容。"),
    "zero_shot": ("Zero-shot", "极速复刻"),
    "zero_shot_help": (
        "Clones the voice of a short recording. Give the exact words of the recording for the closest match.",
        "复刻一段短录音的音色。准确填写录音内容，相似度最高。",
    ),
    "cross_lingual": ("Cross-lingual", "跨语种"),
    "cross_lingual_help": (
        "The voice of the recording speaks a text in another language. No transcript is needed.",
        "用录音的音色朗读另一种语言的文本，无需填写录音内容。",
    ),
    "instruct": ("Instruct", "指令控制"),
    "instruct_help": (
        "The voice of the recording, spoken the way you describe: a dialect, a mood, a pace.",
        "用录音的音色，按您的描述来说：方言、情绪、语速等。",
    ),
    "saved": ("Saved voices", "已存音色"),
    "prompt": ("Recording of the voice, 1 to 30 seconds", "参考录音，1 至 30 秒"),
    "transcript": ("What is said in the recording", "录音内容"),
    "transcript_hint": ("Word for word", "请逐字填写"),
    "instruction": ("How it shall be said", "说话方式"),
    "instruction_hint": ("For example: speak slowly and softly", "例如：用四川话说这句话"),
    "instruction_optional": ("How it shall be said (optional)", "说话方式（可选）"),
    "voice": ("Voice", "音色"),
    "no_voices": ("No voice is saved yet: add one below.", "还没有保存的音色，请在下方添加。"),
    "enrol": ("Save a new voice", "保存新音色"),
    "name": ("Name", "名称"),
    "enrol_button": ("Save voice", "保存音色"),
    "manage": ("Rename or delete the chosen voice", "重命名或删除所选音色"),
    "new_name": ("New name", "新名称"),
    "rename_button": ("Rename", "重命名"),
    "delete_button": ("Delete", "删除"),
    "delete_confirm": ("Delete for good", "确认删除"),
    "delete_keep": ("Keep it", "保留"),
    "generate": ("Generate", "生成"),
    "stop": ("Stop", "停止"),
    "live": ("Now playing", "正在播放"),
    "result": ("Whole recording", "完整录音"),
    "stream": ("Streaming: play while it is being made", "流式：边生成边播放"),
    "no_ffmpeg": ("Needs ffmpeg on the server, which is not installed.", "服务器未安装 ffmpeg，无法边生成边播放。"),
    "speed": ("Speed", "语速"),
    "seed": ("Seed", "随机种子"),
    "seed_hint": ("Empty: a new one each time", "留空则每次不同"),
    "bad_seed": ("The seed is a whole number; leave it empty for a new one.", "种子须为整数，留空则随机。"),
    "ready": ("Ready.", "就绪。"),
    "working": ("Working…", "正在生成…"),
    "waiting": ("Waiting: {count} ahead of you.", "排队中：前面还有 {count} 个请求。"),
    "stopped": ("Stopped.", "已停止。"),
    "summary": (
        "First audio {first_audio:.2f} s · RTF {rtf:.2f} · {seconds:.1f} s of speech · seed {seed}",
        "首音 {first_audio:.2f} 秒 · RTF {rtf:.2f} · 语音 {seconds:.1f} 秒 · 种子 {seed}",
    ),
    "enrolled": ("Saved “{name}”.", "已保存“{name}”。"),
    "renamed": ("The voice is now called “{name}”.", "音色已更名为“{name}”。"),
    "deleted": ("Deleted “{name}”.", "已删除“{name}”。"),
    "need_prompt": ("Upload or record the voice first.", "请先上传或录制参考录音。"),
    "need_instruction": ("Say how the text shall be spoken.", "请填写说话方式。"),
    "need_voice": ("Choose a voice first, or save one.", "请先选择或保存一个音色。"),
    "need_name": ("Give the voice a name.", "请填写音色名称。"),
    "no_sound": ("The model made no sound; try another seed or text.", "模型没有发出声音，请换个种子或文本。"),
    "failure": (
        "Something went wrong inside the engine. The server's log has the details; please try again.",
        "引擎内部出错，详情见服务器日志，请重试。",
    ),
    "untrained": (
        "<strong>This is an untrained stand-in model: it makes noise, not speech.</strong> It shows that everything "
        "works. For real voices start the page with a real one: "
        "<code>python webui.py --model-dir iic/CosyVoice2-0.5B</code>",
        "<strong>当前是未经训练的替代模型，只会发出噪声。</strong>它用来演示整个流程。"
        "要得到真正的语音，请用真实模型启动：<code>python webui.py --model-dir iic/CosyVoice2-0.5B</code>",
    ),
}

_ENGLISH = {key: english for key, (english, _) in _TEXTS.items()}
_CHINESE = {key: chinese for key, (_, chinese) in _TEXTS.items()}

I18N = gr.I18n(**{"en": _ENGLISH, "zh": _CHINESE, "zh-CN": _CHINESE, "zh-TW": _CHINESE})


def label(key: str) -> gr.i18n.I18nData:
    """A text for a component: the browser shows it in its own language."""
    return I18N(key)


def say(request: gr.Request, key: str, **values: object) -> str:
    """A text for a message of the server, in the language that the browser asks for."""
    chinese = request.headers.get("accept-language", "").lower().startswith("zh")
    return (_CHINESE if chinese else _ENGLISH)[key].format(**values)
