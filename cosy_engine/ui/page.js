// What the page does beside Gradio. `texts` has its sentences by language; a file may have `most` megabytes.
(texts, most) => {
  const CLICK_PAUSE = 150; // ms
  const said = texts[navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"];
  const capture = (event, act) => document.addEventListener(event, act, true);

  // Clicks that follow at once would each start a run, for Gradio learns only a moment later that one is going on.
  let last = -Infinity;
  capture("click", (click) => {
    const on = (selector) => click.target.closest(selector);
    if (on("#stop")) last = -Infinity;
    if (on("#generate, #preview, .examples button")) window.livePlayer?.unlock();
    if (!on("#generate, #preview")) return;
    if (click.timeStamp - last < CLICK_PAUSE) click.stopImmediatePropagation();
    else last = click.timeStamp;
  });
  capture("keydown", (key) => {
    if (key.key === "Enter" && key.shiftKey && key.target.closest("#text")) window.livePlayer?.unlock();
  });

  // Gradio loads the page anew when the server was away: what was typed shall not be lost.
  capture("input", ({ target }) => {
    if (target.closest("#text")) sessionStorage.setItem("text", target.value);
  });

  // Files that would be refused are not sent.
  const check = (event, files) => {
    document.querySelector(".refused")?.remove();
    const field = event.target.closest(".prompt") ?? event.target.closest("button, .block")?.parentElement;
    const file = files?.[0];
    if (!file || !field) return;
    const size = (file.size / 2 ** 20).toFixed(0);
    let why = null;
    if (file.size > most * 2 ** 20) why = said.file_too_large.replace("{size}", size).replace("{most}", most);
    else if (field.matches(".prompt") && file.type && !/^(audio|video)\//.test(file.type)) why = said.file_no_recording;
    if (!why) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (event.type === "change") event.target.value = "";
    const sentence = document.createElement("p");
    sentence.className = "refused message error";
    sentence.setAttribute("role", "alert");
    sentence.textContent = why;
    field.after(sentence);
  };
  capture("change", (change) => {
    if (change.target.type === "file") check(change, change.target.files);
  });
  capture("drop", (drop) => check(drop, drop.dataTransfer?.files));

  const style = document.documentElement.style;
  for (const name of ["source_upload", "source_microphone"]) style.setProperty(`--${name}`, JSON.stringify(said[name]));
  document.documentElement.toggleAttribute("data-no-microphone", !navigator.mediaDevices);
}
