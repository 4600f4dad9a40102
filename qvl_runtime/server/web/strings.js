// The page's words in each language, and the element attributes that ask for them.

const ENGLISH = {
  model: "Model",
  newChat: "New chat",
  theme: "Light or dark",
  settings: "Settings",
  picture: "Picture",
  pictures: "Pictures of this conversation",
  dropHere: "Drop pictures here, or paste them",
  choose: "Choose pictures",
  camera: "Take a photo",
  example: "Try an example",
  draw: "Draw a box",
  drawing: "Drag over the picture; Esc cancels",
  score: "Score at least",
  savePng: "Save PNG",
  saveJson: "Save JSON",
  chat: "Chat",
  conversation: "Conversation",
  attached: "Pictures of the next question",
  yourBox: "[box] is",
  left: "Left, 0 to 1000",
  top: "Top, 0 to 1000",
  right: "Right, 0 to 1000",
  bottom: "Bottom, 0 to 1000",
  removeBox: "Remove the box",
  removePicture: "Remove picture {n}",
  showPicture: "Show picture {n}",
  pictureN: "Picture {n}",
  hints: "You could ask:",
  hintCaption: "Generate the caption in English with grounding:",
  hintDescribe: "What is in the picture?",
  hintBox: "Box the cat.",
  hintDrawn: "What is in [box]?",
  question: "Your question",
  ask: "Ask about the picture, or: Box the dog.",
  send: "Send",
  stop: "Stop",
  regenerate: "Answer again",
  edit: "Edit",
  copy: "Copy",
  copied: "Copied",
  retry: "Try again",
  system: "System message",
  systemDefault: "You are a helpful assistant.",
  temperature: "Temperature (0: no chance)",
  modelDefault: "the model's",
  maxTokens: "Longest answer, in tokens",
  all: "what the context has left",
  seed: "Seed",
  random: "random",
  done: "Done",
  cancel: "Cancel",
  keyTitle: "This server asks for a key",
  keyHelp: "It is kept in this tab until you close it, and sent to this server alone.",
  key: "API key",
  useKey: "Use it",
  forgetKey: "Forget the key",
  shoot: "Take it",
  boxes: "{n} boxes",
  oneBox: "1 box",
  box: "box {label}",
  stopped: "stopped",
  cut: "ended at the longest answer",
  you: "You",
  assistant: "Answer",
  answered: "The answer is complete. {boxes}",
  speed: "{tokens} tokens · first after {ttft} s · {rate} tokens/s",
  cached: " · {n} of the prompt from the cache",
  loading: "The model is loading…",
  lost: "The connection was lost before the answer ended.",
  offline: "The server cannot be reached.",
  badKey: "The server refused the key.",
  emptyFile: "{name} is empty.",
  unreadable: "{name} cannot be shown by this browser: save it as JPEG or PNG.",
  notPicture: "{name} is not a picture.",
  tooMany: "This server takes {n} pictures a conversation. Start a new chat, or leave some out.",
  resized: "{name} was reduced to {width} × {height}, this server's limit.",
  upright: "{name} was turned upright.",
  firstFrame: "Of {name}, the model sees the first frame.",
  noCamera: "No camera can be used: {why}",
  nothing: "Write a question first.",
};

const CHINESE = {
  model: "模型",
  newChat: "新对话",
  theme: "浅色或深色",
  settings: "设置",
  picture: "图片",
  pictures: "本次对话的图片",
  dropHere: "把图片拖到这里，或直接粘贴",
  choose: "选择图片",
  camera: "拍照",
  example: "试试示例",
  draw: "画框",
  drawing: "在图片上拖动；Esc 取消",
  score: "最低分数",
  savePng: "保存 PNG",
  saveJson: "保存 JSON",
  chat: "对话",
  conversation: "对话内容",
  attached: "下一个问题的图片",
  yourBox: "[box] 为",
  left: "左，0 到 1000",
  top: "上，0 到 1000",
  right: "右，0 到 1000",
  bottom: "下，0 到 1000",
  removeBox: "去掉这个框",
  removePicture: "去掉图片 {n}",
  showPicture: "显示图片 {n}",
  pictureN: "图片 {n}",
  hints: "可以这样问：",
  hintCaption: "Generate the caption in English with grounding:",
  hintDescribe: "图中有什么？",
  hintBox: "框出图中的猫",
  hintDrawn: "[box]里是什么？",
  question: "你的问题",
  ask: "就图片提问，或者：框出图中的狗",
  send: "发送",
  stop: "停止",
  regenerate: "重新回答",
  edit: "修改",
  copy: "复制",
  copied: "已复制",
  retry: "重试",
  system: "系统消息",
  systemDefault: "You are a helpful assistant.",
  temperature: "温度（0：不随机）",
  modelDefault: "模型默认",
  maxTokens: "回答的最大词元数",
  all: "上下文剩余的全部",
  seed: "随机种子",
  random: "随机",
  done: "完成",
  cancel: "取消",
  keyTitle: "此服务器需要密钥",
  keyHelp: "密钥只保存在此标签页中，关闭即消失，只发送给此服务器。",
  key: "API 密钥",
  useKey: "使用",
  forgetKey: "删除密钥",
  shoot: "拍摄",
  boxes: "{n} 个框",
  oneBox: "1 个框",
  box: "框 {label}",
  stopped: "已停止",
  cut: "达到最大长度",
  you: "你",
  assistant: "回答",
  answered: "回答完成。{boxes}",
  speed: "{tokens} 个词元 · 首个用时 {ttft} 秒 · 每秒 {rate} 个",
  cached: " · 提示中 {n} 个来自缓存",
  loading: "模型加载中……",
  lost: "回答结束前连接中断。",
  offline: "无法连接服务器。",
  badKey: "服务器拒绝了此密钥。",
  emptyFile: "{name} 是空文件。",
  unreadable: "此浏览器无法显示 {name}：请另存为 JPEG 或 PNG。",
  notPicture: "{name} 不是图片。",
  tooMany: "此服务器每次对话最多 {n} 张图片。请开始新对话，或减少图片。",
  resized: "{name} 已缩小到 {width} × {height}，这是此服务器的上限。",
  upright: "{name} 已转正。",
  firstFrame: "模型只看 {name} 的第一帧。",
  noCamera: "无法使用摄像头：{why}",
  nothing: "请先写下问题。",
};

const LANGUAGES = { en: ENGLISH, zh: CHINESE };
const NAMES = { en: "English", zh: "中文" };
let current = "en";

/** The words for a key, with {names} replaced. */
export function t(key, values = {}) {
  return LANGUAGES[current][key].replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** The other language's code and its own name for itself. */
export function otherLanguage() {
  const code = current === "en" ? "zh" : "en";
  return { code, name: NAMES[code] };
}

/** Use a language, and write its words into every element that asks for them. */
export function setLanguage(code, root = document) {
  current = code in LANGUAGES ? code : "en";
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  translate(root);
}

/** Write the words into elements with data-text, data-label or data-placeholder. */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    if (element.matches("button, input")) element.title = t(element.dataset.label);
  }
  for (const element of root.querySelectorAll("[data-placeholder]")) element.placeholder = t(element.dataset.placeholder);
}
