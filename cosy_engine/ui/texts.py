"""Every text of the page, in English and Chinese."""

from __future__ import annotations

import gradio as gr

from cosy_engine.errors import CosyError, InvalidRequestError
from cosy_engine.notices import Notice

_TEXTS: dict[str, tuple[str, str]] = {
    "tagline": ("Type a text, give a voice, hear it at once.", "输入文本，给一段声音，马上听到结果。"),
    # what is said
    "text": ("Text to speak", "要合成的文本"),
    "text_hint": (
        "What should the voice say?",
        "想让这个声音说什么？",
    ),
    "count": ("{count} characters · about {seconds} s of speech", "{count} 字 · 约 {seconds} 秒"),
    "count_too_long": (
        "{count} characters: at most {most} are spoken at once",
        "{count} 字：一次最多 {most} 字",
    ),
    # tabs
    "zero_shot": ("Clone a voice", "极速复刻"),
    "zero_shot_help": (
        "Zero-shot: give a few seconds of a voice, and what is said in them.",
        "上传或录制几秒钟的声音，并填写其中说的话。",
    ),
    "zero_shot_help_timbre": (
        "Zero-shot: give a few seconds of a voice. This model takes the timbre from them, not the way of speaking.",
        "上传或录制几秒钟的声音。此模型只模仿音色，不模仿说话方式。",
    ),
    "cross_lingual": ("Cross-lingual", "跨语种"),
    "cross_lingual_help": (
        "The voice of a recording speaks another language. No transcript is needed.",
        "用录音的音色朗读另一种语言的文本，无需填写录音内容。",
    ),
    "instruct": ("Instruct", "指令控制"),
    "instruct_help": (
        "The voice of a recording, speaking as you describe: a dialect, a mood, a pace.",
        "用录音的音色，按您的描述来说：方言、情绪、语速等。",
    ),
    "instruct_help_learned": (
        "The voice of the recording, spoken slower, faster, lower or higher and so on. This model knows the "
        "instructions below, in several wordings; it ignores others, and says so.",
        "用录音的音色，按指令调整语速、音高或音量。此模型只认识下列指令（可换说法），其他指令会被忽略并提示。",
    ),
    "saved": ("Saved voices", "已存音色"),
    "saved_help": (
        "Speak with a voice that you saved in this browser. Nobody else who visits this page can see or use it.",
        "使用您在此浏览器中保存的音色。其他访问者看不到，也无法使用。",
    ),
    "saved_help_shared": (
        "Speak with a saved voice. Everybody who can open this page sees and uses the same voices.",
        "使用已保存的音色。所有能打开此网页的人共用这些音色。",
    ),
    "examples": (
        "No voice at hand? Click an example: it brings one and plays.",
        "手边没有录音？点击示例，自动填入并播放。",
    ),
    "examples_need_voice": (
        "Examples: a click fills them in, and plays once there is a voice",
        "示例：点击填入，有音色时直接播放",
    ),
    # the recording of a voice; the keys with a dot are Gradio's own, put so that a reader hears what others see
    "upload_text.drop_audio": ("Drop a recording here", "将录音拖放到此处"),
    "upload_text.click_to_upload": ("Click to choose a file", "点击选择文件"),
    "audio.drop_to_upload": (
        "Drop a recording here - or - Click to choose a file",
        "将录音拖放到此处 - 或 - 点击选择文件",
    ),
    "prompt": ("Recording of the voice, 1 to 30 seconds", "参考录音，1 至 30 秒"),
    "transcript": ("What is said in the recording (recommended)", "录音内容（建议填写）"),
    "transcript_hint": ("Word for word; without it the voice is less alike", "请逐字填写；不填则相似度较低"),
    "source_upload": ("File", "文件"),
    "source_microphone": ("Microphone", "麦克风"),
    "file_too_large": (
        "This file has {size} MB, and at most {most} MB are taken: cut it, or save it as mp3.",
        "文件有 {size} MB，最多 {most} MB：请裁剪，或存为 mp3。",
    ),
    "file_no_recording": (
        "This file is not a recording: use wav, mp3, m4a, flac, ogg or webm.",
        "此文件不是录音：请使用 wav、mp3、m4a、flac、ogg 或 webm 格式。",
    ),
    "voice_preparing": ("Preparing the voice…", "正在准备音色…"),
    "voice_ready": ("Voice is ready", "音色已就绪"),
    "verdict_good": ("This recording is good.", "这段录音质量良好。"),
    "verdict_fair": ("This recording works, and could be better.", "这段录音可以使用，但还可以更好。"),
    "verdict_poor": ("This recording will not give a good voice.", "这段录音难以得到好的音色。"),
    "length_good": ("Speech: {value:.1f} s", "语音：{value:.1f} 秒"),
    "length_fair": ("Speech: {value:.1f} s; 3 to 15 s work best", "语音：{value:.1f} 秒，3 至 15 秒最佳"),
    "length_poor": (
        "Speech: {value:.1f} s; it has to be 1 to 30 s. The scissors trim a longer one",
        "语音：{value:.1f} 秒，须为 1 至 30 秒。过长时可用剪刀裁剪",
    ),
    "level_good": ("Loudness: good ({value:.0f} dB)", "音量：合适（{value:.0f} dB）"),
    "level_fair": (
        "Loudness: quiet ({value:.0f} dB); speak closer to the microphone",
        "音量：偏小（{value:.0f} dB），请靠近麦克风",
    ),
    "level_poor": (
        "Loudness: hardly anything can be heard ({value:.0f} dB)",
        "音量：几乎听不到声音（{value:.0f} dB）",
    ),
    "clipping_good": ("Clipping: none", "削波：无"),
    "clipping_fair": ("Clipping: some loud moments are cut off", "削波：部分大音量处失真"),
    "clipping_poor": (
        "Clipping: {value:.1%} is distorted; record again with a lower microphone level",
        "削波：{value:.1%} 失真，请调低麦克风音量后重录",
    ),
    "noise_good": ("Noise: low", "噪声：低"),
    "noise_fair": (
        "Noise: {value:.0f} dB below the voice; 25 dB or more is better",
        "噪声：比人声低 {value:.0f} dB，低 25 dB 以上更好",
    ),
    "noise_poor": (
        "Noise: only {value:.0f} dB below the voice; find a quieter place",
        "噪声：仅比人声低 {value:.0f} dB，请换安静的环境",
    ),
    "silence_good": ("Pauses: {value:.0%} of the time", "停顿：占 {value:.0%}"),
    "silence_fair": (
        "Pauses: {value:.0%} of the time; trim what is not speech",
        "停顿：占 {value:.0%}，请裁去非语音部分",
    ),
    "silence_poor": (
        "Pauses: {value:.0%} of the time is silence; trim it or record again",
        "停顿：{value:.0%} 为静音，请裁剪或重录",
    ),
    # how it is said
    "instruction": ("How it shall be said", "说话方式"),
    "instruction_hint": ("For example: speak slowly and softly", "例如：用四川话说这句话"),
    "instruction_hint_learned": ("For example: speak slowly", "例如：说慢一点"),
    "instruction_optional": ("How it shall be said (optional)", "说话方式（可选）"),
    # saved voices
    "voice": ("Voice", "音色"),
    "no_voices": ("No voice is saved yet: add one below.", "还没有保存的音色，请在下方添加。"),
    "preview": ("Listen", "试听"),
    "preview_text": ("Hello, this is how I sound.", "你好，这就是我的声音。"),
    "voice_about": ("Saved on {created}.", "保存于 {created}。"),
    "voice_builtin": ("Comes with the model.", "模型自带的音色。"),
    "voice_says": ("Its recording says: “{text}”", "录音内容：“{text}”"),
    "enrol": ("Save a new voice", "保存新音色"),
    "name": ("Name", "名称"),
    "name_hint": ("What you want to call the voice", "给音色起个名字"),
    "consent": ("This is my voice, or I may use it.", "这是我本人的声音，或我已获得使用授权。"),
    "enrol_button": ("Save voice", "保存音色"),
    "manage": ("Rename, delete or export the chosen voice; import one", "重命名、删除、导出所选音色，或导入音色"),
    "new_name": ("New name", "新名称"),
    "rename_button": ("Rename", "重命名"),
    "delete_button": ("Delete", "删除"),
    "delete_confirm": ("Delete for good", "确认删除"),
    "delete_keep": ("Keep it", "保留"),
    "export_button": ("Export to a file", "导出为文件"),
    "import_button": ("Import a voice file", "导入音色文件"),
    "enrolled": (
        "Saved “{name}”. It is chosen now: type a text and press Generate.",
        "已保存“{name}”并选中：输入文本，点击生成即可。",
    ),
    "imported": ("Imported “{name}”.", "已导入“{name}”。"),
    "exported": ("Exported “{name}” to your downloads.", "“{name}”已导出到下载目录。"),
    "renamed": ("The voice is now called “{name}”.", "音色已更名为“{name}”。"),
    "deleted": ("Deleted “{name}”.", "已删除“{name}”。"),
    # the run
    "generate": ("Generate", "生成"),
    "stop": ("Stop", "停止"),
    "stream": ("Play while it is being made (streaming)", "边生成边播放（流式）"),
    "speed": ("Speed", "语速"),
    "seed": ("Seed", "随机种子"),
    "seed_hint": ("Empty: a new one each time", "留空则每次不同"),
    "seed_again": ("Use {seed} again", "再次使用 {seed}"),
    "advanced": ("Advanced", "高级设置"),
    "text_frontend": ("Read numbers and symbols as words, and split long text", "将数字和符号读作文字，并切分长文本"),
    "text_frontend_help": (
        "Switch it off for text that is spelt out already.",
        "文本已是逐字读法时可关闭。",
    ),
    "preparing": ("Getting ready…", "正在准备…"),
    "working": ("Working…", "正在生成…"),
    "piece": ("Speaking piece {piece} of {pieces}…", "正在朗读第 {piece} 段，共 {pieces} 段…"),
    "waiting": (
        "Waiting: {count} ahead of you, about {seconds:.0f} s. Stop takes you out of the queue.",
        "排队中：前面还有 {count} 个请求，约 {seconds:.0f} 秒。点击停止可退出排队。",
    ),
    "stopped": ("Stopped.", "已停止。"),
    "summary": (
        "First audio {first_audio:.2f} s · RTF {rtf:.2f} · {seconds:.1f} s of speech · {backend}",
        "首音 {first_audio:.2f} 秒 · RTF {rtf:.2f} · 语音 {seconds:.1f} 秒 · {backend}",
    ),
    # the player
    "player_region": ("Live player", "实时播放器"),
    "player_whole": ("Whole recording", "完整录音"),
    "player_download": ("Download", "下载"),
    "player_waveform": ("Waveform of what has been made so far", "已生成语音的波形"),
    "player_idle": ("You will hear it here.", "在这里播放。"),
    "player_waiting": ("Waiting for the first sound…", "等待首个音频…"),
    "player_playing": ("Playing", "正在播放"),
    "player_buffering": ("Waiting for more…", "正在缓冲…"),
    "player_paused": ("Paused", "已暂停"),
    "player_blocked": ("The browser holds the sound back: press Resume.", "浏览器暂停了声音：请点“继续”。"),
    "player_failed": ("This did not work; the message says why.", "未能完成，原因见提示。"),
    "player_finished": ("Played to the end.", "播放完毕。"),
    "player_stopped": ("Stopped.", "已停止。"),
    "player_first": ("First sound after", "首音延迟"),
    "player_buffered": ("Buffered", "已缓冲"),
    "player_underruns": ("Interruptions", "中断次数"),
    "player_pause": ("Pause", "暂停"),
    "player_resume": ("Resume", "继续"),
    "player_no_worklet": (
        "This address is not secure (https): the browser gives no microphone here, and a simpler player.",
        "当前地址不是安全连接（https）：浏览器不提供麦克风，并改用简易播放方式。",
    ),
    "player_no_sound": (
        "This browser cannot play while the speech is being made; listen when it is finished.",
        "此浏览器不支持边生成边播放，请在完成后收听。",
    ),
    # what went wrong
    "see_field": ("Not yet: please see the marked field.", "尚未完成：请查看标出的字段。"),
    "recording_gone": (
        "The server no longer has this recording: please give it again.",
        "服务器已删除这段录音：请重新上传或录制。",
    ),
    "need_prompt": ("Upload or record the voice first.", "请先上传或录制参考录音。"),
    "need_instruction": ("Say how the text shall be spoken.", "请填写说话方式。"),
    "need_voice": ("Choose a voice first, or save one.", "请先选择或保存一个音色。"),
    "need_name": ("Give the voice a name.", "请填写音色名称。"),
    "need_consent": (
        "Please confirm that this is your voice or that you may use it.",
        "请确认这是您本人的声音，或您已获得使用授权。",
    ),
    "bad_seed": (
        "The seed is a whole number from 0 to 4294967295; leave it empty for a new one.",
        "种子须为 0 至 4294967295 的整数，留空则随机。",
    ),
    "lost": (
        "The connection to the server is lost, or it refused the request. Please try again.",
        "与服务器的连接中断，或请求被拒绝，请重试。",
    ),
    "stalled": (
        "Stopped, for this page has not answered for {minutes:.0f} minutes.",
        "此页面已 {minutes:.0f} 分钟没有响应，已停止生成。",
    ),
    "told_in_english": ("{message}", "出错了：{message}"),
    "failure": (
        "Something went wrong inside the engine. The server's log has the details; please try again.",
        "引擎内部出错，详情见服务器日志，请重试。",
    ),
    "help": ("How to record a good voice", "如何录好参考音"),
    "help_text_timbre": (
        "- **3 to 15 seconds** of one person speaking, without music or other voices; 1 to 30 are taken.\n"
        "- A **quiet room** with curtains or a carpet; a hand's breadth from the microphone.\n"
        "- Begin and end at a pause. The scissors under the recording trim it.\n"
        "- wav, flac, mp3, m4a, ogg or webm. Phone calls and heavily compressed files sound like that later.\n"
        "- Use your own voice, or one whose owner agreed.",
        "- **3 至 15 秒**单人语音，无音乐、无旁人说话；可接受 1 至 30 秒。\n"
        "- **安静的房间**，有窗帘或地毯更好；距麦克风约一掌。\n"
        "- 在停顿处开始和结束。可用录音下方的剪刀裁剪。\n"
        "- 支持 wav、flac、mp3、m4a、ogg、webm。电话录音或高压缩文件的音质会被保留下来。\n"
        "- 只使用本人的声音，或已获授权的声音。",
    ),
    "help_text": (
        "- **3 to 15 seconds** of one person speaking, without music or other voices; 1 to 30 are taken.\n"
        "- A **quiet room** with curtains or a carpet; a hand's breadth from the microphone.\n"
        "- Speak **the way the result shall sound**: its pace, its mood and its pauses are taken over too.\n"
        "- Begin and end at a pause. The scissors under the recording trim it; cut words sound cut.\n"
        "- Write down **exactly** what is said, every word of it and no other.\n"
        "- wav, flac, mp3, m4a, ogg or webm. Phone calls and heavily compressed files sound like that later.\n"
        "- Use your own voice, or one whose owner agreed.",
        "- **3 至 15 秒**单人语音，无音乐、无旁人说话；可接受 1 至 30 秒。\n"
        "- **安静的房间**，有窗帘或地毯更好；距麦克风约一掌。\n"
        "- **希望结果怎样，就怎样说**：语速、情绪、停顿都会被模仿。\n"
        "- 在停顿处开始和结束。可用录音下方的剪刀裁剪；被切断的字听起来也会残缺。\n"
        "- **逐字**填写录音内容，不多也不少。\n"
        "- 支持 wav、flac、mp3、m4a、ogg、webm。电话录音或高压缩文件的音质会被保留下来。\n"
        "- 只使用本人的声音，或已获授权的声音。",
    ),
    "embedded": (
        "This is the small model that comes with the project; it speaks English and Mandarin. For a full-size one, "
        "which sounds better and is downloaded first: <code>python webui.py --model-dir iic/CosyVoice2-0.5B</code>",
        "当前是项目自带的小模型，支持英语和普通话。如需效果更好的完整模型（首次使用会下载）："
        "<code>python webui.py --model-dir iic/CosyVoice2-0.5B</code>",
    ),
    "untrained": (
        "<strong>Untrained stand-in model: it makes noise, not speech.</strong> "
        "For real voices: <code>make demo ARGS=&quot;--model-dir iic/CosyVoice2-0.5B&quot;</code>",
        "<strong>当前是未经训练的替代模型，只会发出噪声。</strong>"
        "真实音色：<code>make demo ARGS=&quot;--model-dir iic/CosyVoice2-0.5B&quot;</code>",
    ),
}

# The engine's errors and notices are English sentences; these say the same in Chinese, by their code.
_CHINESE_ERRORS: dict[str, str] = {
    "text_empty": "文本为空或只有标点：请输入要朗读的文字。",
    "text_too_long": "文本有 {count:,} 字，一次最多 {most:,} 字：请分段生成。",
    "prompt_text_too_long": "录音内容有 {count:,} 字，最多 {most:,} 字：请只填写录音中所说的话。",
    "prompt_text_missing": "请填写录音内容；也可使用“跨语种”，无需填写。",
    "bad_instruction": "请用 1 至 {most:,} 字描述说话方式，例如：说慢一点。",
    "instruction_unknown": "此模型没有学过指令“{instruct}”，已忽略。它认识的指令：{examples}",
    "not_a_recording": "无法读取此文件：请使用 wav、mp3、m4a、flac、ogg 或 webm 格式的录音。",
    "no_sound_in_file": "文件中没有声音。",
    "recording_silent": "录音没有声音：请靠近麦克风重新录制。",
    "recording_length": "录音去掉首尾静音后为 {seconds:.2f} 秒；参考录音须为 {shortest:g} 至 {longest:g} 秒。",
    "recording_too_long": "录音超过 {seconds:.0f} 秒：参考录音须为 1 至 30 秒。",
    "recording_too_large": "录音文件超过 {megabytes} MB：请裁剪，或存为 mp3。",
    "recording_rate": "不支持 {rate} Hz 的采样率：请存为 16 至 48 kHz。",
    "recording_damaged": "录音文件已损坏，只能读出一部分。",
    "name_empty": "名称中至少要有一个可见字符。",
    "name_too_long": "名称有 {count} 字，最多 {most} 字。",
    "voice_exists": "已有名为“{name}”的音色：请换个名称，或先删除它。",
    "voice_not_found": "找不到这个音色：它可能已被删除。",
    "voice_damaged": "这个音色的文件已损坏：请删除后重新保存。",
    "voice_mismatch": "这个音色是用另一个模型制作的：请用当前模型重新保存。",
    "voice_builtin": "这是模型自带的音色，不能更改。",
    "too_many_voices": "已保存 {count} 个音色，不能再多：请先删除一个。",
    "bad_voice_file": "这个音色文件无法使用：它已损坏，或不是音色文件。",
    "bad_speed": "语速须为 {low} 至 {high}。",
    "speed_of_stream": "当前设置下，边生成边播放时不能调整语速。",
    "too_long_together": "文本和录音内容加起来太长：请缩短其中一个。",
    "no_sound": "模型没有发出声音：请换个种子或文本。",
    "queue_full": "排队人数已满：请约 {seconds:.0f} 秒后重试。",
    "engine_stopped": "服务器正在关闭或重启，请稍后重试。",
    "backend_failed": "语音模型出现故障，正在自动恢复，请重试。",
}

_ENGLISH = {key: english for key, (english, _) in _TEXTS.items()}
_CHINESE = {key: chinese for key, (_, chinese) in _TEXTS.items()}

I18N = gr.I18n(**{"en": _ENGLISH, "zh": _CHINESE, "zh-CN": _CHINESE, "zh-TW": _CHINESE})


def label(key: str) -> gr.i18n.I18nData:
    """A text for a component: the browser shows it in its own language."""
    return I18N(key)


def both(*keys: str) -> dict[str, dict[str, str]]:
    """Texts for the page's own JavaScript, by language."""
    return {"en": {key: _ENGLISH[key] for key in keys}, "zh": {key: _CHINESE[key] for key in keys}}


def say(request: gr.Request, key: str, **values: object) -> str:
    """A text for a message of the server, in the language that the browser asks for."""
    return (_CHINESE if _wants_chinese(request) else _ENGLISH)[key].format(**values)


def complaint(key: str, param: str | None = None, **values: object) -> InvalidRequestError:
    """An error that the page itself finds, for `sentence` to say."""
    return InvalidRequestError(_ENGLISH[key].format(**values), param=param, code=key, **values)


def sentence(request: gr.Request, error: CosyError | Notice) -> str:
    """What an error or a notice says, in the language that the browser asks for."""
    if not _wants_chinese(request):
        return error.message
    told = _CHINESE_ERRORS.get(error.code) or _CHINESE.get(error.code)
    return told.format(**error.values) if told else _CHINESE["told_in_english"].format(message=error.message)


def _wants_chinese(request: gr.Request) -> bool:
    return request.headers.get("accept-language", "").lower().startswith("zh")
