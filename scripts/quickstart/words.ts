/**
 * English for the names of things: Unicode's labels become noun phrases, and questions about them agree in number.
 * emoji.ts takes names from here, records.ts questions and sentences. It touches nothing else.
 */

/** Labels that name no thing ("dizzy", "tennis", "construction"), and what they are called here. */
export const RENAMED: Readonly<Record<string, string>> = {
  // faces and people
  'rolling on the floor laughing': 'face rolling on the floor laughing',
  'star-struck': 'star-struck face',
  'skull and crossbones': 'skull with crossbones',
  dizzy: 'dizzy star',
  'dashing away': 'puff of air',
  'palms up together': 'cupped palms',
  'breast-feeding': 'breast-feeding woman',
  'horse racing': 'horse race',
  // food and travel
  'leafy green': 'leafy vegetable',
  cooking: 'fried egg',
  camping: 'campsite',
  'building construction': 'building site',
  wedding: 'wedding chapel',
  foggy: 'foggy bridge',
  'night with stars': 'starry night',
  'light rail': 'light rail train',
  construction: 'construction barrier',
  'airplane departure': 'departing airplane',
  'airplane arrival': 'arriving airplane',
  'hourglass done': 'finished hourglass',
  'hourglass not done': 'running hourglass',
  // activities and objects
  tennis: 'tennis racket',
  bowling: 'bowling ball',
  'field hockey': 'field hockey stick',
  'ice hockey': 'ice hockey stick',
  lacrosse: 'lacrosse stick',
  'ping pong': 'ping pong paddle',
  badminton: 'badminton racket',
  'performing arts': 'theater masks',
  headphone: 'headphones',
  'speaker low volume': 'speaker at low volume',
  'speaker medium volume': 'speaker at medium volume',
  'speaker high volume': 'speaker at high volume',
  'chart increasing with yen': 'rising chart with yen',
  'chart increasing': 'rising chart',
  'chart decreasing': 'falling chart',
  locked: 'closed padlock',
  unlocked: 'open padlock',
  'locked with pen': 'padlock with pen',
  'locked with key': 'padlock with key',
  dna: 'dna strand',
  "woman's clothes": "women's clothes",
  // symbols
  radioactive: 'radiation sign',
  prohibited: 'prohibition sign',
  multiply: 'multiplication sign',
  divide: 'division sign',
  information: 'information button',
  'input latin uppercase': 'latin uppercase button',
  'input latin lowercase': 'latin lowercase button',
  'input numbers': 'numbers button',
  'input symbols': 'symbols button',
  'input latin letters': 'latin letters button',
}

/** Labels that say what a sign means; the thing is the sign. */
export const SIGNS: readonly string[] = [
  ...['zzz', 'hundred points', 'high voltage', 'potable water', 'non-potable water', "men's room", "women's room"],
  ...['restroom', 'water closet', 'passport control', 'customs', 'baggage claim', 'left luggage', 'warning'],
  ...['children crossing', 'no entry', 'no bicycles', 'no smoking', 'no littering', 'no pedestrians'],
  ...['no mobile phones', 'no one under eighteen', 'biohazard', 'place of worship', 'om'],
  ...['aries', 'taurus', 'gemini', 'cancer', 'leo', 'virgo', 'libra', 'scorpio', 'sagittarius', 'capricorn'],
  ...['aquarius', 'pisces', 'ophiuchus', 'cinema', 'wireless', 'vibration mode', 'mobile phone off', 'plus', 'minus'],
  ...['infinity', 'currency exchange', 'copyright', 'registered', 'trade mark'],
]

/** Lower case, letters, digits, spaces, hyphens and apostrophes. */
export const plain = (text: string): string =>
  text
    .normalize('NFKD')
    .replace(/\p{M}/gu, '')
    .replace(/[‘’]/g, "'")
    .replace(/["“”().!:]/g, '')
    .replace(/[^A-Za-z0-9' -]+/g, ' ')
    .replace(/\s+/g, ' ')
    .trim()
    .toLowerCase()

/** What a thing is called, from its Unicode label. */
export function nameOf(label: string): string {
  const name = plain(label)
  if (SIGNS.includes(name)) return `${name} sign`
  return (
    RENAMED[name] ??
    name
      .replace(/^(\w+ o'clock|\w+-thirty)$/, 'clock at $1')
      .replace(/^(\w+) button blood type$/, 'blood type $1 button')
      .replace(/^(black|white) (large|medium|medium-small|small) square$/, '$2 $1 square')
  )
}

/** Names of one thing alone: `Is santa claus in the picture?`, `Is the milky way in the picture?` */
const PROPER = new Set(['santa claus', 'mrs claus', 'mx claus', 'mount fuji', 'tokyo tower'])
const THE_ONE = new Set(['statue of liberty', 'kaaba', 'milky way'])
const MASS = new Set([
  ...['bacon', 'bread', 'broccoli', 'butter', 'candy', 'cheese', 'chocolate', 'confetti', 'coral', 'custard', 'fire'],
  ...['fog', 'fondue', 'food', 'garlic', 'ginger', 'hair', 'ice', 'liquid', 'luggage', 'mate', 'meat', 'milk', 'money'],
  ...['music', 'oden', 'pasta', 'polish', 'popcorn', 'rice', 'sake', 'salt', 'seafood', 'soap', 'spaghetti', 'sushi'],
  ...['tea', 'tempura', 'tofu', 'water', 'wood', 'yarn'],
])
const PLURAL = new Set(['men', 'people', 'skis', 'women'])

type Kind = 'one' | 'several' | 'mass' | 'proper' | 'the'
function kindOf(name: string): Kind {
  if (PROPER.has(name)) return 'proper'
  if (THE_ONE.has(name)) return 'the'
  // what comes after such a word says more about the thing, and its number does not count
  const [thing] = name.split(
    / (?:with|without|of|in|on|for|from|over|at|under|showing|holding|hugging|lifting|wrestling)\b/,
  )
  const last = thing.split(' ').at(-1) as string
  if (MASS.has(last)) return 'mass'
  return PLURAL.has(last) || (/[a-z]s$/.test(last) && !/(ss|us|is|ros)$/.test(last)) ? 'several' : 'one'
}

/** By sound, not by letter: `an hourglass`, `an x-ray`, `a unicorn`. */
const article = (name: string): string =>
  /^([aeiou]|hour|x-|ng |sos )/.test(name) && !/^(uni|u-|one|eu|ewe)/.test(name) ? 'an' : 'a'

/** `a kite`, `an apple`, `cherries`, `bread`, `mount fuji`, `the milky way`. */
export function withArticle(name: string): string {
  const kind = kindOf(name)
  if (kind === 'one') return `${article(name)} ${name}`
  return kind === 'the' ? `the ${name}` : name
}

/** `Is there a kite in the picture?`, `Are there cherries in the picture?`, `Is mount fuji in the picture?` */
export function isThere(name: string): string {
  const kind = kindOf(name)
  if (kind === 'proper' || kind === 'the') return `Is ${withArticle(name)} in the picture?`
  return `${kind === 'several' ? 'Are' : 'Is'} there ${withArticle(name)} in the picture?`
}
